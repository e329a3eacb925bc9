"""An engine of two ranks (tensor parallelism) on the CPU: refilled, it holds the bytes that vLLM's own loaders put into it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from qarl import formats
from qarl.batching import pack_to_score
from qarl.config import RolloutConfig
from qarl.errors import EngineError, SyncError
from qarl.kernels.dispatch import backends
from qarl.records import Prompt, Sampling, WeightUpdate
from qarl.trainer.aligned import AlignedModel
from qarl.trainer.model import load_model
from qarl.trainer.policy import Policy, to_tensors

pytestmark = pytest.mark.slow  # each process imports vLLM

CASES = [
    ("bf16", "llama", "float32"),
    ("w8a8_int8", "qwen3", "float32"),
    ("bf16", "qwen3_moe", "float32"),
    ("bf16", "one_kv_head", "float32"),
    ("w8a8_int8", "qwen2", "float32"),
    ("w8a8_fp8", "qwen3", "float32"),
    ("w4a16_g32", "qwen3", "bfloat16"),
]
PROMPTS = [
    Prompt(id=i, text=t, tokens=np.array([ord(c) - 25 for c in t], np.int32), answer="")
    for i, t in enumerate(["2 + 2 =", "a longer prompt than the other one", "x"])
]
SEEDS = np.arange(6, dtype=np.int64).reshape(3, 2)
GREEDY = Sampling(temperature=0, max_tokens=24)
CANARY = np.arange(20, 40, dtype=np.int32)


@dataclass
class Rig:
    """A filled engine of two ranks and what fills it."""

    pair: Any
    format: str
    kind: str
    dtype: str
    folder: Path
    publish: Callable[..., WeightUpdate]
    """seed -> update, of the next version."""
    model: Callable[[int], PreTrainedModel]
    config: RolloutConfig

    def refill(self, seed: int) -> list[Any]:
        return self.pair("refill", self.publish(seed), [CANARY])

    def greedy(self) -> list[list[int]]:
        return _tokens(self.pair("generate", PROMPTS, GREEDY, SEEDS[:, :1]))


def _tokens(answers: list[Any]) -> list[list[int]]:
    first, second = ([c.tokens.tolist() for c in completions] for completions in answers)
    assert first == second
    return first


def of(cases: list[tuple[str, str, str]]) -> pytest.MarkDecorator:
    """`rig`, one for each of these."""
    return pytest.mark.parametrize("rig", cases, indirect=True, ids=lambda case: "-".join(case[:2]), scope="module")


@pytest.fixture(scope="module")
def rig(request, pair, weights, published, model_folder):
    from qarl.rollout.capability import supported_formats

    format, kind, dtype = request.param
    if reason := supported_formats(dtype)[format]:
        pytest.skip(f"this machine's vLLM does not run {format}: {reason}")
    config = RolloutConfig(format=format, kv_cache_gb=0.05, max_sequences=64, tensor_parallel=2)
    contracts = pair.open("refilled", config, model_folder(kind), dtype)
    versions = iter(range(1000))

    def model(seed: int) -> PreTrainedModel:
        policy = weights(kind, seed).bfloat16()  # what a checkpoint holds
        return policy if dtype == "bfloat16" else policy.float()

    def publish(seed: int) -> WeightUpdate:
        return published(model(seed), format, next(versions))

    assert contracts == [publish(1).contract_hash] * 2
    yield Rig(pair, format, kind, dtype, model_folder(kind), publish, model, config)
    pair("close")


@of(CASES)
def test_both_ranks_write_the_same_tokens_and_going_back_restores_them(rig: Rig):
    said = []
    for seed in (1, 2, 1):
        one, other = rig.refill(seed)
        np.testing.assert_array_equal(one.canaries[0], other.canaries[0])
        assert max(one.max_tile_error, other.max_tile_error) < (1e-6 if rig.dtype == "float32" else 1e-2)
        said.append(rig.greedy())
    assert said[0] == said[2] != said[1]
    drawn = _tokens(rig.pair("generate", PROMPTS, Sampling(max_tokens=12), SEEDS))
    assert _tokens(rig.pair("generate", PROMPTS, Sampling(max_tokens=12), SEEDS)) == drawn


@of(CASES)
def test_log_probs_are_those_of_the_published_policy(rig: Rig, reference_logits):
    """Of row-parallel layers each rank rounds its half of the inputs, so activations of 8 bits have other scales than the
    reference's."""
    rig.refill(1)
    scored, _ = rig.pair("score", [CANARY], [1])
    sequence = torch.from_numpy(CANARY).long()
    logits = reference_logits(rig.model(1).float(), rig.format, sequence)
    expected = logits.log_softmax(-1)[:-1].gather(1, sequence[1:, None])[:, 0].numpy()
    bound = {"bf16": 2e-3, "w8a8_fp8": 0.3}.get(rig.format, 0.1)
    assert np.abs(scored[0] - expected).mean() < bound


@of(CASES[1:2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_learner_told_of_two_ranks_computes_what_they_serve_and_one_that_is_not_does_not(rig: Rig, ranks: int):
    if reason := backends(rig.format, "cpu", torch.float32)["engine"]:
        pytest.skip(reason)
    rig.refill(1)
    scored, _ = rig.pair("score", [CANARY], [1])
    model = load_model(rig.folder, torch.float32)
    model.load_state_dict(rig.model(1).state_dict())
    AlignedModel(model, formats.get(rig.format), "engine", "cpu", torch.float32, ranks)
    batch, order = pack_to_score([CANARY], 1, 4096)
    with torch.no_grad():
        logprobs, _ = Policy(model, 1.0, 512)(to_tensors(batch.ranks[0][0], torch.device("cpu")))
    gap = np.abs(order.unpack([[logprobs.numpy()]])[0] - scored[0]).mean()
    assert gap < 2e-5 if ranks == 2 else gap > 2e-3


FAULTY = "model.layers.1.self_attn.o_proj"


def _refuse(rig: Rig) -> None:
    with pytest.raises(ExceptionGroup) as refused:
        rig.greedy()
    assert refused.group_contains(EngineError, match="last refill failed")


@of(CASES[:2])
def test_a_flipped_bit_is_named_by_both_ranks_and_neither_generates(rig: Rig):
    rig.refill(1)
    before, served = rig.greedy(), rig.pair("version")
    update = rig.publish(2)
    part, wire = next(iter(update.tensors[FAULTY].items()))
    data = wire.data.copy()
    data[1234] ^= 16
    broken = {**update.tensors, FAULTY: {**update.tensors[FAULTY], part: replace(wire, data=data)}}
    with pytest.raises(ExceptionGroup) as found:
        rig.pair("refill", replace(update, tensors=broken), [CANARY])
    assert all(isinstance(e, SyncError) and f"{FAULTY} ({part}) was changed" in str(e) for e in found.value.exceptions)
    assert rig.pair("version") == served
    _refuse(rig)
    rig.refill(1)
    assert rig.greedy() == before


@of(CASES[1:2])
def test_what_fails_on_one_rank_alone_fails_on_both(rig: Rig):
    """Rank 1 leaves a tensor as it was; its tiles say so, and rank 0, whose half is right, does not serve it."""
    rig.refill(1)
    served = rig.pair("version")
    rig.pair.one(1, "skip", "model.layers.1.self_attn.qkv_proj")
    for failing in (lambda: rig.refill(2), lambda: rig.refill(2)):
        with pytest.raises(ExceptionGroup) as found:
            failing()
        mine, others = map(str, reversed(found.value.exceptions))
        assert "qkv_proj: the engine serves other weights" in mine and others == f"rank 1 of the engine: {mine}"
    assert rig.pair("version") == served
    _refuse(rig)


@of(CASES)
def test_every_byte_is_where_vllm_would_have_put_it(rig: Rig, exported, tmp_path):
    """An engine of two ranks that vLLM filled from an exported checkpoint, by its own loaders."""
    rig.pair("close")
    rig.pair.open("refilled", rig.config, rig.folder, rig.dtype)
    rig.refill(2)
    rig.refill(3)
    refilled, held = rig.greedy(), rig.pair("bytes_held")
    rig.pair("close")
    checkpoint = exported(rig.model(3), rig.format, rig.folder, tmp_path)
    rig.pair.open("stock", rig.config, checkpoint, rig.dtype)
    assert rig.pair("bytes_held") == held
    assert rig.greedy() == refilled
    assert len({tuple(tokens) for tokens in refilled}) > 1
