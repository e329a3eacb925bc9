"""The vLLM engine on a GPU: every format, dense and experts, refilled while CUDA graphs hold its tensors.

One engine a case, each closed before the next starts. `-k w4a16-wide_moe` runs one case.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from qarl import formats
from qarl.config import RolloutConfig
from qarl.errors import EngineError
from qarl.records import Completion, Prompt, Sampling, WeightUpdate
from qarl.rollout.engine import open_engine
from qarl.rollout.vllm_engine import VllmEngine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONTEXT = 256
CASES = [(format, kind) for kind in ("wide", "wide_moe") for format in formats.FORMATS]
RNG = np.random.default_rng(0)
PROMPTS = [Prompt(i, "", RNG.integers(5, 90, n).astype(np.int32), "") for i, n in enumerate((3, 40, 17, 90))]
SEEDS = np.arange(len(PROMPTS), dtype=np.int64)[:, None]
GREEDY = Sampling(temperature=0, max_tokens=48)


@dataclass
class Rig:
    format: str
    kind: str
    engine: VllmEngine
    model: Callable[[int], PreTrainedModel]
    """seed -> the policy, bfloat16."""
    published: Callable[..., WeightUpdate]
    version: int = 0

    def refill(self, seed: int) -> float:
        """The worst tile, after proving that the contract and every byte are those published."""
        self.version += 1
        update = self.published(self.model(seed), self.format, self.version)
        report = self.engine.refill(update)
        assert report.contract_hash == update.contract_hash == self.engine.contract_hash()
        covered = [n for n, parts in update.tensors.items() if "weight_scale" in parts]
        assert sorted(t.tensor for t in update.tiles) == sorted(covered)
        return report.max_tile_error

    def greedy(self) -> list[Completion]:
        return self.engine.generate(PROMPTS, GREEDY, SEEDS)

    def score(self, completions: list[Completion]) -> list[np.ndarray]:
        sequences = [np.concatenate([p.tokens, c.tokens]) for p, c in zip(PROMPTS, completions, strict=True)]
        return self.engine.score(sequences, [len(p.tokens) for p in PROMPTS])

    def addresses(self) -> dict[str, int]:
        """Of every tensor the layers and their kernel objects hold: all that a CUDA graph may read."""
        found = {}
        for path, module in self.engine._refill.model.named_modules():
            method = getattr(module, "quant_method", None)
            experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
            kernel = getattr(getattr(module, "scheme", None), "kernel", None)
            for holder in (module, method, experts, getattr(experts, "quant_config", None), kernel):
                members = {**getattr(holder, "_parameters", {}), **getattr(holder, "__dict__", {})}
                for name, value in members.items():
                    if isinstance(value, torch.Tensor):
                        found[f"{path}.{type(holder).__name__}.{name}"] = value.data_ptr()
        return found


def _open(case: tuple[str, str], model_folder, eager: bool = False) -> VllmEngine:
    format, kind = case
    config = RolloutConfig(engine="vllm", format=format, gpu_memory=0.1, max_sequences=8, eager=eager)
    engine = open_engine(config, model_folder(kind), "bfloat16", CONTEXT, tile_tolerance=0.01)
    assert isinstance(engine, VllmEngine)
    return engine


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def rig(request, model_folder, weights, published) -> Iterator[Rig]:
    format, kind = request.param
    before = _allocated()
    engine = _open(request.param, model_folder)
    made = Rig(format, kind, engine, lambda seed: weights(kind, seed).to(torch.bfloat16), published)
    yield made
    engine.close()
    del engine, made.engine
    assert _allocated() - before < 64 * 2**20, "a closed engine kept GPU memory"


def _allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def _tokens(completions: list[Completion]) -> list[list[int]]:
    return [c.tokens.tolist() for c in completions]


def test_without_graphs_the_log_probs_are_the_same(model_folder, weights, published):
    """First in the file, before there is a `rig`: of two engines alive, the second would take the first one's workspace."""
    policy = weights("wide", 1).to(torch.bfloat16)
    completions: list[Completion] = []
    for eager in (False, True):
        engine = _open(("w8a8_int8", "wide"), model_folder, eager)
        rig = Rig("w8a8_int8", "wide", engine, lambda _: policy, published)
        rig.refill(1)
        completions = completions or rig.greedy()
        scores = rig.score(completions)
        engine.close()
    errors = np.concatenate([np.abs(s - c.logprobs) for s, c in zip(scores, completions, strict=True)])
    assert errors.mean() < 0.02


def test_a_sleeping_engine_gives_its_memory_back_and_answers_as_before_once_refilled(model_folder, weights, published):
    policy = weights("wide_moe", 1).to(torch.bfloat16)
    config = RolloutConfig(engine="vllm", format="w4a16", gpu_memory=0.1, max_sequences=8, sleep=True)
    engine = open_engine(config, model_folder("wide_moe"), "bfloat16", CONTEXT, tile_tolerance=0.01)
    assert isinstance(engine, VllmEngine)
    rig = Rig("w4a16", "wide_moe", engine, lambda _: policy, published)
    rig.refill(1)
    before, addresses = rig.greedy(), rig.addresses()
    for _ in range(3):
        free, _ = torch.cuda.mem_get_info()
        engine.sleep()
        assert torch.cuda.mem_get_info()[0] - free > 2**30  # its KV cache alone is more
        with pytest.raises(EngineError, match="it sleeps"):
            rig.greedy()
        rig.refill(1)
        assert _tokens(rig.greedy()) == _tokens(before) and rig.addresses() == addresses
        for a, b in zip(rig.greedy(), before, strict=True):
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-3)
    engine.close()


def test_every_tensor_is_written_where_it_lives_once_vllm_laid_it_out(rig: Rig):
    rig.refill(1)
    refill = rig.engine._refill
    assert refill.homes.keys() == refill.slots.keys()


def test_a_refill_serves_what_was_published_at_the_addresses_it_had(rig: Rig):
    assert rig.refill(1) <= 0.01
    before = rig.addresses()
    assert len(before) > 10
    assert rig.refill(2) <= 0.01
    assert rig.addresses() == before


def test_other_weights_answer_otherwise_and_going_back_restores_the_answers(rig: Rig):
    rig.refill(1)
    first = rig.greedy()
    assert _tokens(rig.greedy()) == _tokens(first)
    rig.refill(2)
    other = rig.greedy()
    assert _tokens(other) != _tokens(first)
    rig.refill(1)
    again = rig.greedy()
    assert _tokens(again) == _tokens(first)
    for a, b in zip(again, first, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-3)


def test_scores_are_the_log_probs_of_generation(rig: Rig):
    """Decoding replays graphs, scoring is one prefill: the same weights in other kernels' shapes, so bfloat16 noise
    remains, a hundredth of a nat in the mean."""
    rig.refill(1)
    completions = rig.greedy()
    errors = np.concatenate([np.abs(s - c.logprobs) for s, c in zip(rig.score(completions), completions, strict=True)])
    assert errors.mean() < 0.02 and np.isfinite(errors).all()


def test_canaries_are_recorded_once_and_score_what_vllm_scores_without_a_graph(rig: Rig):
    """Three policies, the same canaries: a graph that kept anything of the first policy's forward would score that one."""
    canaries = [np.random.default_rng(i).integers(5, 90, n).astype(np.int32) for i, n in enumerate((30, 7, 61))]
    first = rig.engine._replay.captures
    scored = []
    for seed in (1, 2, 1):
        rig.refill(seed)
        replayed = np.concatenate(rig.engine._score_canaries(canaries))
        np.testing.assert_allclose(replayed, np.concatenate(rig.engine.score(canaries, [1] * 3)), atol=2e-3)
        scored.append(replayed)
    assert rig.engine._replay.captures == first + 1
    assert np.abs(scored[0] - scored[1]).mean() > 0.1
    np.testing.assert_allclose(scored[2], scored[0], atol=2e-3)


def test_log_probs_are_those_of_the_published_policy(rig: Rig, reference_logits):
    """In float32 on the CPU, weights and inputs of linear layers rounded. Another policy is off by more than a nat."""
    rig.refill(1)
    completions = rig.greedy()
    errors = []
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        sequence = torch.from_numpy(np.concatenate([prompt.tokens, completion.tokens])).long()
        logits = reference_logits(rig.model(1).float(), rig.format, sequence)[len(prompt.tokens) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, sequence[len(prompt.tokens) :, None])[:, 0].numpy()
        errors.append(np.abs(completion.logprobs - expected))
    assert np.concatenate(errors).mean() < 0.2


def test_the_same_seed_draws_the_same_tokens_and_another_draws_others(rig: Rig):
    rig.refill(1)
    sampling = Sampling(max_tokens=24)
    seeds = np.arange(8, dtype=np.int64).reshape(4, 2)
    drawn = _tokens(rig.engine.generate(PROMPTS, sampling, seeds))
    assert _tokens(rig.engine.generate(PROMPTS, sampling, seeds)) == drawn
    assert _tokens(rig.engine.generate(PROMPTS, sampling, seeds + 100)) != drawn
