"""Saved and loaded, training goes on as if it had never stopped; files are what they are said to be."""

import json
import resource
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qarl.errors import CheckpointError

ADAMW = {"schedule": "cosine", "warmup": 1, "weight_decay": 0.1}
MUON = {"name": "muon", "lr": 0.01}
EIGHT_BIT = {"name": "adamw_8bit"}


def assert_bits_equal(a, b):
    assert np.array_equal(a["logprobs"], b["logprobs"])
    assert a["sums"] == b["sums"] and a["grad_norm"] == b["grad_norm"]
    for ours, theirs in ((a["masters"], b["masters"]), *zip(a["moments"].values(), b["moments"].values(), strict=True)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    ("zero", "optimizer"),
    [(0, ADAMW), (2, ADAMW), (3, ADAMW), (0, MUON), (0, EIGHT_BIT)],
    ids=["zero0", "zero2", "zero3", "muon", "8bit"],
)
def test_two_steps_and_two_resumed_equal_four_bit_for_bit(models, one_rank, zero, optimizer):
    common = {"model": str(models["moe"]), "zero": zero, "optimizer": optimizer, "format": "w8a8_int8"}
    common |= {"backend": "emulated", "tokens": 40}
    whole = one_rank(**common, steps=4)
    half = one_rank(**common, steps=2)
    resumed = one_rank(**common, steps=2, load=str(half["out"]))
    assert_bits_equal(resumed, whole)
    assert not np.array_equal(half["logprobs"], whole["logprobs"])
    assert json.loads((resumed["out"] / "learner" / "state.json").read_text())["updates"] == 4


def test_another_zero_stage_continues_within_rounding(models, one_rank):
    common = {"model": str(models["dense"]), "optimizer": {"lr": 1e-4}, "tokens": 40}
    whole = one_rank(**common, steps=3)
    for first, second in ((0, 3), (3, 1), (2, 0)):
        half = one_rank(**common, steps=2, zero=first)
        resumed = one_rank(**common, steps=1, zero=second, load=str(half["out"]))
        assert resumed["logprobs"] == pytest.approx(whole["logprobs"], abs=2e-5)
        assert resumed["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


@pytest.mark.slow
def test_another_world_size_continues_within_rounding(models, one_rank, two_ranks):
    common = {"model": str(models["dense"]), "optimizer": {"lr": 1e-4}, "tokens": 40}
    whole, half = one_rank(**common, steps=3), one_rank(**common, steps=2)
    pairs = two_ranks(
        {
            "half": {**common, "steps": 2, "zero": 3},
            "up0": {**common, "steps": 1, "load": str(half["out"])},
            "up3": {**common, "steps": 1, "zero": 3, "load": str(half["out"])},
        }
    )
    down = one_rank(**common, steps=1, zero=1, load=str(pairs["half"]["out"]))
    for resumed in (pairs["up0"], pairs["up3"], down):
        assert resumed["logprobs"] == pytest.approx(whole["logprobs"], abs=2e-5)
        assert resumed["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


def test_a_learner_that_never_stepped_can_be_saved_and_loaded(scenarios, models, tmp_path):
    learner = scenarios.make_learner(models["dense"])
    learner.save(tmp_path)
    other = scenarios.make_learner(models["dense"], zero=3)
    other.load(tmp_path)
    samples = scenarios.scored(learner, scenarios.make_samples(), 200)
    a, b = (scenarios.step(each, samples, 200) for each in (learner, other))
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)


@pytest.mark.parametrize("kind", ["dense", "tied", "moe"])
def test_policy_is_what_transformers_loads(models, one_rank, kind):
    out = one_rank(model=str(models[kind]), zero=3, steps=1)["out"]
    pair: Any = AutoModelForCausalLM.from_pretrained(out / "policy", dtype=torch.float32, output_loading_info=True)
    loaded, report = pair
    assert not report["missing_keys"] and not report["unexpected_keys"]
    masters = one_rank(model=str(models[kind]), zero=3, steps=1)["masters"]
    assert {name for name, _ in loaded.named_parameters()} == masters.keys()
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, masters[name]), name
    assert (out / "policy" / "tokenizer.json").is_file() and (out / "policy" / "config.json").is_file()


@pytest.mark.parametrize("zero", [1, 3])
def test_bfloat16_models_keep_float32_masters_through_a_resume(models, one_rank, zero):
    common = {"model": str(models["moe"]), "dtype": "bfloat16", "zero": zero, "tokens": 40}
    whole, half = one_rank(**common, steps=3), one_rank(**common, steps=2)
    assert_bits_equal(one_rank(**common, steps=1, load=str(half["out"])), whole)
    assert any(not torch.equal(m, m.bfloat16().float()) for m in whole["masters"].values())
    policy = AutoModelForCausalLM.from_pretrained(whole["out"] / "policy")
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, whole["masters"][name].bfloat16()), name


def test_nothing_but_safetensors_and_json_is_written(models, one_rank):
    out = one_rank(model=str(models["dense"]))["out"]
    kinds = {file.suffix for folder in ("policy", "learner") for file in (out / folder).rglob("*") if file.is_file()}
    assert kinds == {".safetensors", ".json"}


@pytest.mark.parametrize("folder", ["policy", "learner"])
def test_a_disk_that_refuses_is_an_oserror_wherever_it_does(scenarios, models, tmp_path, monkeypatch, folder):
    """A limit on file sizes stands for the full disk; safetensors has an error of its own for it."""
    learner = scenarios.make_learner(models["dense"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if folder == "learner":
        monkeypatch.setattr("qarl.trainer.learner.save_policy", lambda *_: None)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            learner.save(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_is_missing_or_of_another_model_is_refused(scenarios, models, one_rank, tmp_path):
    out = one_rank(model=str(models["dense"]))["out"]
    with pytest.raises(CheckpointError, match="the model's is"):
        scenarios.make_learner(models["moe"]).load(out)
    with pytest.raises(CheckpointError, match="learner.optimizer.name"):
        scenarios.make_learner(models["dense"], optimizer=MUON).load(out)
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    (copy / "learner" / "exp_avg_sq-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match="'exp_avg_sq': 0"):
        scenarios.make_learner(models["dense"]).load(copy)
    (copy / "learner" / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="state.json"):
        scenarios.make_learner(models["dense"]).load(copy)
