"""The strict builder, and every configuration that is shipped."""

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from qarl import algorithm, config
from qarl.build import build, check_keys, to_mapping
from qarl.cli import GROUPS, check_overrides, register
from qarl.config import RunConfig
from qarl.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "data, message",
    [
        ({"rollout": {"fromat": "bf16"}}, "rollout.fromat: unknown key; did you mean 'format'?"),
        ({"rollout": {"format": "int9"}}, "rollout.format: 'int9' is not one of"),
        ({"learner": {"zero": 7}}, r"learner.zero: 7 is not one of \[0, 1, 2, 3\]"),
        ({"learner": {"zero": True}}, "learner.zero: True is not one of"),
        ({"steps": "x"}, "steps: expected int, got 'x'"),
        ({"steps": True}, "steps: expected int, got True"),
        ({"learner": 3}, "learner: expected a mapping"),
        ({"rollout": {"sampling": {"stop": "a"}}}, "rollout.sampling.stop: expected a list"),
        ({"rollout": {"sampling": {"stop": [1]}}}, r"rollout.sampling.stop\[0\]: expected str, got 1"),
        ({"learner": {"optimizer": {"betas": [0.9]}}}, "learner.optimizer.betas: expected 2 values, got 1"),
        ({"algorithm": {"mini_batches": 3}}, "algorithm.mini_batches: 3 does not divide"),
        ({"model": {"max_tokens": 100}}, "model.max_tokens: 100 cannot hold"),
        ({"model": {"path": "x"}}, "model: give exactly one of path, gguf, pocket"),
        ({"rollout": {"sampling": {"top_p": 0.9}}}, "rollout.sampling: top_p must be 1"),
        ({"rollout": {"sampling": {"stop": ["a", ""]}}}, "rollout.sampling.stop: must hold no empty string"),
        (
            {"rollout": {"tensor_parallel": 4}},
            r"rollout.tensor_parallel: 4 is not one of \[1, 2\]: sums over more ranks",
        ),
        (
            {"rollout": {"tensor_parallel": 2, "engine": "torch"}},
            "rollout.tensor_parallel: 2 needs rollout.engine=vllm, got torch",
        ),
        (
            {"rollout": {"tensor_parallel": 2, "format": "bf16"}, "placement": {"gpus": 2}},
            "rollout.replicas: 2 colocated engine GPUs",
        ),
        ({"rollout": {"restarts": -1}}, "rollout.restarts: must not be negative, got -1"),
        ({"name": ""}, "name: must be a plain folder name .* got ''"),
        ({"name": ".."}, "name: must be a plain folder name .* got '..'"),
        ({"name": "a/b"}, "name: must be a plain folder name .* got 'a/b'"),
        ({"seed": -1}, "^seed: must not be negative, got -1"),
        ({"data": {"max_prompt_tokens": 0}}, "data.max_prompt_tokens: must be positive, got 0"),
        ({"reward": {"kind": "reasoning_gym"}}, "reward.kind: 'reasoning_gym' .* data.train.source is ''"),
        ({"algorithm": {"group": 1, "mini_batches": 1}}, "algorithm.group: must be at least 2, got 1"),
        ({"learner": {"backend": "fast"}}, "learner.backend: 'fast' is not one of"),
        ({"learner": {"optimizer": {"warmup": -1}}}, "learner.optimizer.warmup: must not be negative"),
        ({"learner": {"optimizer": {"weight_decay": -0.1}}}, "learner.optimizer.weight_decay: must not be negative"),
        ({"learner": {"optimizer": {"betas": [0.9, 1.0]}}}, r"learner.optimizer.betas: .* got \[0.9, 1.0\]"),
        ({"sync": {"tiles": -1}}, "sync.tiles: must not be negative"),
        ({"sync": {"canaries": -1}}, "sync.canaries: must not be negative"),
        ({"guard": {"stop": {"mismatch": 0}}}, "guard.stop.mismatch: must be positive"),
        ({"guard": {"warn": {"ess": 1.5}}}, "guard.warn.ess: a share, must be at least 0 and below 1, got 1.5"),
        ({"guard": {"stop": {"entropy_drift": 0.5}}}, "guard.stop.entropy_drift: a factor, must be above 1, got 0.5"),
        ({"guard": {"correct": {"error_share": 0.5}}}, "guard.correct.error_share: unknown key"),
        ({"guard": {"patience": 0}}, "guard.patience: must be positive"),
        ({"evaluation": {"prompts": 0}}, "evaluation.prompts: must be positive"),
        ({"evaluation": {"n": 0}}, "evaluation.n: must be positive"),
        ({"evaluation": {"n": 4}}, "evaluation.n: 4 greedy completions of a prompt are one and the same"),
        ({"model": {"pocket": {"batch_size": 0}}}, "model.pocket.batch_size: must be positive, got 0"),
        ({"model": {"pocket": {"steps": -1}}}, "model.pocket.steps: must not be negative, got -1"),
        ({"model": {"pocket": {"worked_share": 2.0}}}, "model.pocket.worked_share: .* at most 1, got 2.0"),
        ({"model": {"revision": "abc"}}, "model.revision: 'abc' is of a hub model"),
        ({"model": {"pocket": {"min_terms": 8}}}, r"model.pocket.min_terms: .* 6 at most, got 8"),
        (
            {"model": {"pocket": {}}, "data": {"train": {"source": "reasoning_gym:chain_sum", "template": "{prompt}"}}},
            r"data.train.template: '\{prompt\}', but the pocket model is warm-started, .* model.pocket.template=",
        ),
        ({"evaluation": {"temperature": -1}}, "evaluation.temperature: must not be negative"),
        ({"model": {"pocket": {"heads": 4, "kv_heads": 3}}}, "model.pocket.heads: 4 is no multiple of"),
        ({"placement": {"gpus": 4}}, "placement.gpus: 4 GPUs, but mode 'colocate'"),
        ({"learner": {"zero": 0}}, "learner.zero: 0 keeps no float32 masters of a bfloat16 model"),
        ({"learner": {"optimizer": {"name": "muon"}}}, "learner.optimizer.name: 'muon' needs whole matrices"),
        ({"learner": {"zero": 3, "optimizer": {"name": "adamw_8bit"}}}, "learner.optimizer.name: 'adamw_8bit' needs"),
        (
            {"algorithm": {"objective": {"kl_coefficient": 0.1}}},
            "algorithm.objective.kl_coefficient: must be 0, got 0.1",
        ),
        (
            {"algorithm": {"objective": {"kl_estimator": "k1"}}},
            "algorithm.objective.kl_estimator: 'k1' would not be read",
        ),
        ({"learner": {"optimizer": {"min_lr_ratio": -3}}}, "learner.optimizer.min_lr_ratio: .* got -3"),
        ({"learner": {"optimizer": {"muon_momentum": 7}}}, "learner.optimizer.muon_momentum: .* got 7"),
        ({"learner": {"threads": 0}}, "learner.threads: must be positive, got 0"),
        (
            {"model": {"pocket": {"experts": 4, "experts_per_token": 9}}},
            "model.pocket.experts_per_token: .* at most model.pocket.experts = 4, got 9",
        ),
        (
            {"placement": {"mode": "split"}},
            "placement.mode: 'split' says which GPUs are whose, but placement.gpus is 0",
        ),
        (
            {"guard": {"correct": {"kl": 0.1}}, "algorithm": {"mini_batches": 2}},
            "guard.correct.kl: with algorithm.mini_batches=2 nothing is left to skip .* needs 3 or more",
        ),
        (
            {"guard": {"correct": {"grad_norm": 10}}, "algorithm": {"mini_batches": 1}},
            "guard.correct.grad_norm: with algorithm.mini_batches=1 .* needs 2 or more",
        ),
    ],
)
def test_a_mistake_names_the_key_the_value_and_the_choices(data, message):
    base = to_mapping(RunConfig())
    merged = merge(base, data)
    with pytest.raises(ConfigError, match=message):
        build(RunConfig, merged)


def merge(base: dict, data: dict) -> dict:
    out = dict(base)
    for key, value in data.items():
        out[key] = merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return out


def test_integers_become_floats_and_lists_tuples():
    built = build(RunConfig, {"rollout": {"sampling": {"temperature": 1, "stop": ["a", "b"]}}})
    assert built.rollout.sampling.temperature == 1.0 and isinstance(built.rollout.sampling.temperature, float)
    assert built.rollout.sampling.stop == ("a", "b")


def test_the_tree_survives_a_round_trip_through_plain_data(composed):
    original = composed("recipe=qwen3_30b_a3b_math_w4a16")
    assert build(RunConfig, to_mapping(original)) == original


@pytest.mark.parametrize("recipe", GROUPS["recipe"])
def test_every_recipe_builds_and_is_named_after_its_file(composed, recipe):
    assert composed(f"recipe={recipe}").name == recipe


@pytest.mark.parametrize("group, option", [(g, o) for g in GROUPS if g != "recipe" for o in GROUPS[g]])
def test_every_option_of_every_group_composes(group, option):
    register()
    with initialize_config_module(version_base="1.3", config_module="qarl.configs"):
        data = compose("train", overrides=[f"{group}={option}"])
    check_keys(RunConfig, [f"{group}.{key}" for key in data[group]])


BANDS = {
    "tbpo_tens": algorithm.tbpo(positive_high=2e-2, negative_low=1.5e-2, negative_high=3.5e-2),
    "tbpo_hundreds": algorithm.tbpo(positive_high=4e-3, negative_low=3e-3, negative_high=7e-3),
}


@pytest.mark.parametrize("recipe", [None, *GROUPS["recipe"]])
@pytest.mark.parametrize("name", GROUPS["algorithm"])
def test_an_algorithm_is_the_constructor_of_its_name_in_every_recipe(composed, name, recipe):
    chosen = composed(*([f"recipe={recipe}"] if recipe else []), f"algorithm={name}").algorithm.objective
    assert chosen == (BANDS[name] if name in BANDS else getattr(algorithm, name)())


@pytest.mark.parametrize(
    "argument, message",
    [
        ("rollout.fromat=bf16", "rollout.fromat: unknown key; did you mean 'format'?"),
        ("recipe=quickstrat", "recipe: 'quickstrat' is not one of .*did you mean 'quickstart'?"),
        ("algorithm=ppo", "algorithm: 'ppo' is not one of"),
        ("+foo=1", "foo: unknown key"),
        ("nothing.here=1", "nothing: unknown key"),
    ],
)
def test_the_command_line_names_what_it_does_not_know(argument, message):
    with pytest.raises(ConfigError, match=message):
        check_overrides([argument])


def test_free_mappings_take_any_key():
    check_overrides(["+data.train.options.max_terms=3", "recipe=quickstart", "hydra.verbose=true", "--multirun"])


def test_every_field_has_a_doc_string():
    for module in (config, algorithm):
        for node in ast.parse(inspect.getsource(module)).body:
            if isinstance(node, ast.ClassDef):
                for here, after in zip(node.body, [*node.body[1:], None], strict=True):
                    if isinstance(here, ast.AnnAssign):
                        documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                        assert documented, f"{node.name}.{ast.unparse(here.target)}"


def test_the_tree_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().steps = 3  # type: ignore[misc]
