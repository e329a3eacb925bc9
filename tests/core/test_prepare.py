"""What is refused before anything expensive starts."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer, Qwen3Config

from qarl import prepare as module
from qarl.errors import ConfigError
from qarl.prepare import check_fit, prepare, prepare_evaluation
from qarl.shapes import pocket_architecture

POCKET = ("recipe=quickstart", "model.pocket.steps=0", "model.pocket.layers=1")
FEW = ("data.train.size=20", "data.heldout.size=4")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QARL_CACHE", str(tmp_path / "cache"))


def test_an_evaluation_does_not_read_the_training_data(composed):
    config = composed(*POCKET, *FEW, "data.train.source=missing.jsonl", "evaluation.prompts=3")
    model, prompts, _ = prepare_evaluation(config)
    assert len(prompts) == 3 and model.startswith(str(module.cache_folder()))
    with pytest.raises(ConfigError, match="data.train.source: no such file 'missing.jsonl'"):
        prepare(config)


def test_a_format_that_does_not_fit_the_model_is_refused(composed):
    config = composed("recipe=quickstart", "rollout.format=w4a16", "model.pocket.hidden_size=96")
    with pytest.raises(ConfigError, match="rollout.format: 'w4a16' needs input features divisible by 128"):
        check_fit(config, pocket_architecture(config.model.pocket))


def test_a_context_beyond_the_models_positions_is_refused(composed):
    config = composed(*POCKET, *FEW, "model.pocket.context=256")
    with pytest.raises(ConfigError, match="model.max_tokens: 512, but the model has 256 positions"):
        prepare(config)


def test_a_tokenizer_that_does_not_load_is_refused(composed, tmp_path):
    made, *_ = prepare_evaluation(composed(*POCKET, *FEW))
    (Path(made) / "tokenizer.json").write_text(json.dumps({"version": "none"}))
    with pytest.raises(ConfigError, match="model.path: .* has no tokenizer that loads"):
        prepare_evaluation(composed(*POCKET, *FEW))


def test_canaries_without_two_tokens_are_refused(composed, monkeypatch):
    config = composed(*POCKET, *FEW, "data.chat=false", "sync.canaries=2")
    whole = module.to_prompts

    def shortened(*arguments):
        sets = whole(*arguments)
        short = tuple(replace(prompt, tokens=prompt.tokens[:1]) for prompt in sets.heldout)
        return replace(sets, heldout=short)

    assert len(prepare(config).canaries) == 2
    monkeypatch.setattr(module, "to_prompts", shortened)
    with pytest.raises(ConfigError, match="data.heldout: none of the first 2 prompts has two tokens"):
        prepare(config)


@pytest.mark.parametrize("source", ["data.train.source=missing.jsonl", "data.heldout.source=missing.jsonl"])
def test_data_is_read_before_a_policy_is_made(composed, source):
    with pytest.raises(ConfigError, match="source: no such file 'missing.jsonl'"):
        prepare(composed(*POCKET, *FEW, source))
    assert not module.cache_folder().exists()


def test_gpus_that_are_not_here_are_refused_before_a_policy_is_made(composed, monkeypatch):
    monkeypatch.setattr(module.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="placement.gpus: 1, but torch sees 0 here"):
        prepare(composed("recipe=quickstart_gpu", *FEW))
    monkeypatch.setattr(module.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="placement.gpus: 0 runs on CPU, but torch sees 1 here"):
        prepare(composed("recipe=quickstart", *FEW))
    assert not module.cache_folder().exists()


def test_a_stop_string_of_a_special_token_is_refused(composed):
    eos = AutoTokenizer.from_pretrained(prepare_evaluation(composed(*POCKET, *FEW))[0]).eos_token
    with pytest.raises(ConfigError, match=r"rollout.sampling.stop\[1\]: .* holds the special token"):
        prepare(composed(*POCKET, *FEW, f"rollout.sampling.stop=['=','{eos}']"))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("rollout.format=w4a16",), "rollout.format: 'w4a16' needs input features divisible by 128"),
        (
            ("rollout.format=bf16", "model.max_tokens=999", "learner.tokens=999"),
            "model.max_tokens: 999, but the model has 512",
        ),
        (("rollout.format=bf16", "rollout.tensor_parallel=2", "rollout.engine=vllm"), "rollout.tensor_parallel: 2"),
    ],
)
def test_a_model_of_the_hub_is_held_against_the_run_before_anything_starts(
    composed, tmp_path, monkeypatch, overrides, says
):
    Qwen3Config(
        hidden_size=96, num_attention_heads=3, num_key_value_heads=3, head_dim=32, max_position_embeddings=512
    ).save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda name, revision: read(tmp_path))
    config = composed("recipe=quickstart", "model=folder", "model.path=some/model", "model.dtype=float32", *overrides)
    with pytest.raises(ConfigError, match=says):
        module.prepare_policy(config, [])
