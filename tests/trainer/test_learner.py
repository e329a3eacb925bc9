"""The learner computes one and the same step however samples are packed and whatever DeepSpeed shards.

Rounding: float32 sums in another order. Gradients of these models are within 2e-6 of their largest entry of each other.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qarl.batching import pack
from qarl.errors import DivergenceError
from qarl.trainer.policy import FILLER
from qarl.trainer.ranks import set_threads
from qarl.wire import from_wire

TOLERANCE = 5e-6  # of the largest entry


def assert_same_step(a, b, tolerance=TOLERANCE):
    assert a["logprobs"] == pytest.approx(b["logprobs"], abs=2e-6)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    assert a["sums"] == pytest.approx(b["sums"], rel=1e-5, abs=1e-6)
    assert a["gradient"].keys() == b["gradient"].keys() and a["masters"].keys() == b["masters"].keys()
    for name, gradient in b["gradient"].items():
        assert (a["gradient"][name] - gradient).abs().max() <= tolerance * gradient.abs().max(), name
        # The first step of AdamW is lr * g / (|g| + 1e-8): the rounding of a tiny g decides about all of its step, so compare
        # where g is not tiny.
        clear = gradient.abs() > 1e-3 * gradient.abs().max()
        assert torch.allclose(a["masters"][name][clear], b["masters"][name][clear], atol=1e-6, rtol=0), name


def float64_reference(scenarios, folder, samples):
    """Log-probs, loss and gradient of GRPO's first step (ratio 1), one unpacked sequence at a time, plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    model.set_experts_implementation("eager") if hasattr(model.config, "num_experts") else None
    logprobs: list[np.ndarray] = []
    loss: Any = 0.0
    for sample in samples:
        tokens = torch.from_numpy(np.concatenate([sample.prompt_tokens, sample.completion.tokens])).long()
        n = len(sample.completion.tokens)
        logits = model(tokens[None], use_cache=False).logits[0, -n - 1 : -1] / 0.8
        own = logits.log_softmax(-1).gather(-1, tokens[-n:, None])[:, 0]
        logprobs.append(own.detach().numpy())
        loss = loss - sample.advantage * torch.exp(own - own.detach()).mean() / len(samples)
    loss.backward()
    gradient = {name: p.grad for name, p in model.named_parameters()}
    return np.concatenate(logprobs), loss.item(), gradient


@pytest.mark.parametrize("kind", ["dense", "tied", "moe"])
def test_step_equals_plain_transformers_in_float64(scenarios, models, one_rank, kind):
    ours = one_rank(model=str(models[kind]))
    logprobs, loss, gradient = float64_reference(scenarios, models[kind], scenarios.make_samples(seed=0))
    assert ours["logprobs"] == pytest.approx(logprobs, abs=5e-6)
    assert ours["sums"]["loss"] == pytest.approx(loss, abs=1e-6)
    norm = torch.stack([g.norm() for g in gradient.values()]).norm().item()
    assert ours["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert ours["gradient"].keys() == gradient.keys()
    for name, expected in gradient.items():
        assert (ours["gradient"][name].double() - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def test_eight_sequences_at_once_equal_one_at_a_time(models, one_rank):
    assert_same_step(one_rank(model=str(models["dense"]), tokens=14), one_rank(model=str(models["dense"])))


def test_gradients_added_up_in_float32_are_not_rounded_again_at_any_stage(models, one_rank):
    """In bfloat16: DeepSpeed's stage 1 alone would round them before it reduces them, by 1 in 256."""
    found = [one_rank(model=str(models["dense"]), dtype="bfloat16", tokens=14, zero=zero) for zero in (1, 2)]
    assert found[0]["grad_norm"] == pytest.approx(found[1]["grad_norm"], rel=1e-6)


@pytest.mark.parametrize(
    ("shell", "threads", "expected"), [(None, None, 2), ("3", None, None), ("3", 5, 5), (None, 5, 5)]
)
def test_a_rank_has_the_threads_it_is_told_or_the_shells_or_its_share(monkeypatch, shell, threads, expected):
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if shell:
        monkeypatch.setenv("OMP_NUM_THREADS", shell)
    set_threads(threads, 2)
    assert told == ([] if expected is None else [expected])


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_zero_stages_make_the_same_step(models, one_rank, zero):
    kind = "moe" if zero == 3 else "dense"
    assert_same_step(one_rank(model=str(models[kind]), tokens=30, zero=zero), one_rank(model=str(models[kind])))


def test_two_ranks_make_the_same_step_as_one(models, one_rank, two_ranks):
    dense, moe = str(models["dense"]), str(models["moe"])
    pairs = two_ranks({"zero0": {"model": dense, "tokens": 30}, "zero3": {"model": moe, "tokens": 30, "zero": 3}})
    assert_same_step(pairs["zero0"], one_rank(model=dense))
    assert_same_step(pairs["zero3"], one_rank(model=moe))


@pytest.mark.slow
def test_every_stage_model_and_world_makes_the_same_step(models, one_rank, two_ranks):
    cases = {
        f"{kind}-{zero}-{checkpointing}": {
            "model": str(models[kind]),
            "tokens": 30,
            "zero": zero,
            "gradient_checkpointing": checkpointing,
        }
        for kind in models
        for zero in range(4)
        for checkpointing in (False, True)
    }
    pairs = two_ranks(cases)
    for name, case in cases.items():
        reference = one_rank(model=case["model"])
        assert_same_step(pairs[name], reference)
        assert_same_step(one_rank(**case), reference)


@pytest.mark.parametrize("zero", [0, 3])
def test_gradient_checkpointing_changes_nothing(models, one_rank, zero):
    common = {"model": str(models["moe"]), "format": "w8a8_int8", "backend": "emulated", "zero": zero}
    assert_same_step(one_rank(**common, gradient_checkpointing=True), one_rank(**common))


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_gradient_is_clipped_to_the_global_norm_and_reported_before(models, one_rank, zero):
    free = one_rank(model=str(models["dense"]))
    limit = free["grad_norm"] / 4
    clipped = one_rank(model=str(models["dense"]), zero=zero, optimizer={"grad_clip": limit})
    assert clipped["grad_norm"] == pytest.approx(free["grad_norm"], rel=1e-5)
    for name, gradient in free["gradient"].items():
        assert torch.allclose(
            clipped["gradient"][name], gradient / 4, atol=1e-5 * gradient.abs().max().item(), rtol=1e-4
        )


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_nan_gradient_stops_with_weights_unchanged_and_can_still_be_saved(scenarios, models, tmp_path, zero):
    learner = scenarios.make_learner(models["dense"], zero=zero)
    before = learner.publish(0, 0)
    samples = scenarios.scored(learner, scenarios.make_samples(), 200)
    with pytest.raises(DivergenceError, match="not finite"):
        scenarios.step(learner, [replace(s, advantage=float("nan")) for s in samples], 200)
    after = learner.publish(0, 0)
    assert checksums(before) == checksums(after)
    learner.save(tmp_path)
    masters = scenarios.tensors(tmp_path, "masters")
    assert masters.keys() == learner.parameters().keys() and all(m.isfinite().all() for m in masters.values())


def test_samples_without_response_and_fillers_change_nothing(scenarios, models):
    learner = scenarios.make_learner(models["dense"])
    samples = scenarios.scored(learner, scenarios.make_samples(), 200)
    empty = replace(
        samples[0],
        completion=replace(samples[0].completion, tokens=np.empty(0, np.int32), logprobs=np.empty(0, np.float32)),
        old_logprobs=np.empty(0, np.float32),
    )
    plain = scenarios.step(learner, samples, 200)
    other = scenarios.make_learner(models["dense"])
    batch, alone = pack(samples, 1, 14), pack([empty], 1, 14).ranks[0]
    stats = other.update([*batch.ranks[0], *alone, FILLER], batch.n_sequences, batch.n_tokens)
    assert stats.sums["dropped"] == 1 and plain.sums["dropped"] == 0
    assert stats.grad_norm == pytest.approx(plain.grad_norm, rel=1e-5)


def test_codes_follow_the_weights_after_every_update(scenarios, models):
    """What is published after a step is the new masters quantized, and what the next score computes with."""
    from qarl.kernels.dispatch import load

    learner = scenarios.make_learner(models["moe"], format="w4a16_g32", backend="emulated", optimizer={"lr": 0.05})
    samples = scenarios.scored(learner, scenarios.make_samples(), 200)
    first = learner.publish(0, 2)
    scenarios.step(learner, samples, 200)
    second = learner.publish(1, 2)
    assert checksums(first) != checksums(second)
    for name, parameter in learner.model.named_parameters():
        if name.endswith("experts.down_proj"):
            codes = load("w4a16_g32", "emulated").quantize(parameter.data, 32)
            published = second.tensors[name.replace("down_proj", "w2")]
            assert all(torch.equal(from_wire(published[part]), codes[part]) for part in codes)
    rescored = scenarios.scored(learner, samples, 200)
    fresh = scenarios.make_learner(models["moe"], format="w4a16_g32", backend="emulated")
    fresh.model.load_state_dict(learner.model.state_dict())
    for a, b in zip(rescored, scenarios.scored(fresh, samples, 200), strict=True):
        assert np.array_equal(a.old_logprobs, b.old_logprobs)


@pytest.mark.parametrize(("zero", "kept"), [(2, True), (3, False)])
def test_only_a_sharded_model_keeps_no_codes_between_forwards(scenarios, models, zero, kept):
    learner = scenarios.make_learner(models["moe"], format="w8a8_int8", backend="emulated", zero=zero)
    scenarios.scored(learner, scenarios.make_samples(), 200)
    assert set(learner.aligned._prepared) == (set(learner.aligned.covered) if kept else set())


def test_aligned_learner_scores_otherwise_than_unaligned(scenarios, models):
    plain = scenarios.make_learner(models["dense"], format="w8a8_int8", backend="none")
    aligned = scenarios.make_learner(models["dense"], format="w8a8_int8", backend="emulated")
    assert plain.contract_hash() == aligned.contract_hash()
    samples = scenarios.make_samples()
    gaps = [
        np.abs(a.old_logprobs - b.old_logprobs).max()
        for a, b in zip(scenarios.scored(plain, samples, 200), scenarios.scored(aligned, samples, 200), strict=True)
    ]
    assert 1e-4 < max(gaps) < 0.5


def checksums(update):
    return {(name, part): value for name, parts in update.checksums.items() for part, value in parts.items()}
