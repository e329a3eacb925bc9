"""Triton's row functions against float64 on the same logits, and the whole function on the vocabulary of a real model."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qarl.kernels import logprob, logprob_fused

BLOCK = logprob_fused.BLOCK
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(3, 2 * BLOCK + 9), (2, BLOCK), (3, 50), (2, 1)]  # rows, vocabulary


def rows(shape: tuple[int, int], dtype: torch.dtype, device: str, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    """Logits and targets."""
    generator = torch.Generator().manual_seed(shape[1])
    logits = (torch.randn(shape, generator=generator) * scale).to(dtype)
    return logits.to(device), torch.randint(0, shape[1], shape[:1], generator=generator).to(device)


def dense(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies in float64; a token of probability 0 adds nothing."""
    logp = torch.log_softmax(logits.double() / temperature, -1)
    return logp.gather(-1, targets[:, None]).squeeze(-1), -(logp.exp() * logp.clamp_min(-1e300)).sum(-1)


def assert_near(ours: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_those_of_float64(
    shape: tuple[int, int], dtype: torch.dtype, temperature: float, device: str
) -> None:
    """To float32's 2^-24 of a tempered logit of 50, and of the exponential's."""
    logits, targets = rows(shape, dtype, device)
    before = logits.clone()
    logprobs, entropies, lse = logprob_fused.score_rows(logits, targets, temperature)
    assert logprobs.dtype == entropies.dtype == lse.dtype == torch.float32 and torch.equal(logits, before)
    expected = dense(logits, targets, temperature)
    assert_near(logprobs, expected[0], 1e-5)
    assert_near(entropies, expected[1], 1e-5)
    assert_near(lse, (logits.double() / temperature).logsumexp(-1), 1e-6)


@pytest.mark.parametrize("temperature", [0.3, 1.7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_are_those_of_float64_autograd(
    shape: tuple[int, int], dtype: torch.dtype, temperature: float, device: str
) -> None:
    """In place, in the logits' dtype, with the outputs' gradients expanded as those of a sum are."""
    logits, targets = rows(shape, dtype, device)
    d_logprobs = torch.tensor(-0.7, device=device).expand(len(logits))
    d_entropies = torch.tensor([3.0, -2.0, 0.5], device=device)[: len(logits)]
    exact = logits.double().requires_grad_()
    logprobs, entropies = dense(exact, targets, temperature)
    (logprobs @ d_logprobs.double() + entropies @ d_entropies.double()).backward()
    _, entropy, lse = logprob_fused.score_rows(logits, targets, temperature)
    ours = logprob_fused.gradient_rows(logits, targets, lse, entropy, d_logprobs, d_entropies, temperature)
    assert ours.data_ptr() == logits.data_ptr() and ours.dtype == dtype
    assert exact.grad is not None
    # Half a spacing of the dtype; a whole one in the interpreter, which truncates to bfloat16 where a GPU rounds.
    rounding = torch.finfo(dtype).eps / (2 if device == "cuda" else 1)
    torch.testing.assert_close(ours.double(), exact.grad, rtol=2e-5 + rounding, atol=5e-5)


def test_a_span_of_the_vocabulary_has_its_part_of_the_gradient(device: str) -> None:
    """Of targets outside the span, on either side, it holds nothing."""
    logits, _ = rows((4, 300), torch.float32, device)
    targets = torch.tensor([0, 99, 100, 299], device=device)
    _, entropies, lse = logprob_fused.score_rows(logits, targets, 1.0)
    gradients = torch.ones(4, device=device), torch.full((4,), 0.5, device=device)
    spans = []
    for functions in (logprob, logprob_fused):
        parts = [
            functions.gradient_rows(
                logits[:, start : start + 100].clone(), targets - start, lse, entropies, *gradients, temperature=0.7
            )
            for start in (0, 100, 200)
        ]
        spans.append(torch.cat(parts, 1))
    whole = logprob_fused.gradient_rows(logits.clone(), targets, lse, entropies, *gradients, temperature=0.7)
    assert torch.equal(spans[1], whole)
    torch.testing.assert_close(spans[1], spans[0], rtol=1e-5, atol=1e-6)


EXTREMES = {
    "equal": torch.full((BLOCK + 5,), 3.0),
    "all of it on the first": torch.full((BLOCK + 5,), -65504.0).index_fill(0, torch.tensor(0), 65504.0),
    "all of it on the last": torch.full((BLOCK + 5,), -65504.0).index_fill(0, torch.tensor(BLOCK + 4), 65504.0),
    "two alike among the lowest": torch.full((BLOCK + 5,), -65504.0).index_fill(
        0, torch.tensor([1, BLOCK + 1]), 65504.0
    ),
    "lowest alone": torch.full((BLOCK + 5,), -65504.0),
    "-inf before the first finite": torch.full((BLOCK + 5,), -math.inf).index_fill(0, torch.tensor(BLOCK + 1), 2.0),
    "-inf among others": torch.linspace(-5, 5, BLOCK + 5).index_fill(0, torch.tensor([0, 7, BLOCK]), -math.inf),
    "as far apart as float32 goes": torch.full((BLOCK + 5,), -1.6e38).index_fill(0, torch.tensor(BLOCK + 2), 1.6e38),
}


@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_rows(name: str, device: str) -> None:
    """Scores as float64's, and gradients that are finite and add up to 0, as the probabilities add up to 1."""
    logits = EXTREMES[name].repeat(3, 1).to(device)
    targets = torch.tensor([0, 1, BLOCK + 1], device=device)
    logprobs, entropies, lse = logprob_fused.score_rows(logits, targets, 1.0)
    expected = dense(logits, targets, 1.0)
    torch.testing.assert_close(logprobs.double(), expected[0], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(entropies.double(), expected[1], rtol=1e-6, atol=1e-5)
    d_entropies = torch.tensor([5.0, -5.0, 0.1], device=device)
    d_logits = logprob_fused.gradient_rows(
        logits.clone(), targets, lse, entropies, torch.ones(3, device=device), d_entropies, 1.0
    )
    assert d_logits.isfinite().all()
    # An lse of 65504 in float32 leaves 2^-9 of each probability, whose part of the entropy's gradient is 5 H at most.
    assert (d_logits.sum(-1).abs() <= 2**-8 * (1 + 5 * entropies)).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_a_distribution_spoils_itself_alone(value: float, device: str) -> None:
    logits, targets = rows((3, BLOCK + 5), torch.bfloat16, device)
    clean = logprob_fused.score_rows(logits, targets, 1.0)
    logits[1, BLOCK + 2] = value
    for spoiled, before in zip(logprob_fused.score_rows(logits, targets, 1.0), clean, strict=True):
        assert spoiled[1].isnan() and torch.equal(spoiled[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize("target", [-1, 50])
def test_a_target_outside_the_vocabulary_has_no_logprob(target: int, device: str) -> None:
    logits, targets = rows((3, 50), torch.float32, device)
    targets[1] = target
    logprobs, entropies, _ = logprob_fused.score_rows(logits, targets, 1.0)
    assert logprobs.isnan().tolist() == [False, True, False] and entropies.isfinite().all()


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_the_whole_function_with_the_kernels_is_that_with_the_definition(
    chunk: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 6, generator=generator), torch.randn(33, 6, generator=generator)
    mix = torch.randn(2, 7, generator=generator).to(device)
    results = []
    for functions in (
        (logprob.score_rows, logprob.gradient_rows),
        (logprob_fused.score_rows, logprob_fused.gradient_rows),
    ):
        monkeypatch.setattr(logprob, "row_functions", lambda *_, chosen=functions: chosen)
        h, w = hidden.to(device).requires_grad_(), weight.to(device).requires_grad_()
        logprobs, entropies = logprob.chunked_logprobs(h, w, torch.arange(7, device=device) * 4, 0.7, chunk)
        (logprobs @ mix[0] + entropies @ mix[1]).backward()
        results.append([logprobs, entropies, h.grad, w.grad])
        hidden, weight = hidden.detach(), weight.detach()
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


VOCABULARY = 151_936


def head(tokens: int, hidden_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, lm_head and targets on the GPU, with logits of deviation 3."""
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(VOCABULARY, hidden_size, generator=generator, device="cuda", dtype=torch.bfloat16)
    weight *= 3 / hidden_size**0.5
    targets = torch.randint(0, VOCABULARY, (tokens,), generator=generator, device="cuda")
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", [64, 1024])
def test_bfloat16_on_a_real_vocabulary_against_float64(chunk: int) -> None:
    """A logit is rounded once, by 2^-9 of it: a log-prob is off by that at most twice, its own and the lse's, a gradient
    by that of each probability (as a norm, with 2^-9 more for each rounding of gradients to bfloat16)."""
    hidden, weight, targets = head(300, 512)
    temperature, mix = 0.7, torch.randn(2, 300, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    logprobs, entropies = logprob.chunked_logprobs(hidden, weight, targets, temperature, chunk)
    (logprobs @ mix[0] + entropies @ mix[1]).backward()
    exact = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    logits = exact[0] @ exact[1].t()
    expected = dense(logits, targets, temperature)
    (expected[0] @ mix[0].double() + expected[1] @ mix[1].double()).backward()
    rounding = float(logits.detach().abs().max()) / temperature * 2**-9
    assert float((logprobs - expected[0]).abs().max()) <= 2 * rounding
    # Of entropies: each probability's part moves by `rounding` of it, times how far its log-prob is from -H.
    assert float((entropies - expected[1]).abs().max()) <= 2 * rounding * 3 / temperature
    for ours, leaf in zip((hidden, weight), exact, strict=True):
        assert ours.grad is not None and leaf.grad is not None
        assert float((ours.grad - leaf.grad).norm() / leaf.grad.norm()) <= rounding + 2**-8


@pytest.mark.gpu
@pytest.mark.parametrize("rows_, vocabulary", [(64, VOCABULARY), (33, VOCABULARY - 1)])
def test_rows_of_a_real_vocabulary_against_float64(rows_: int, vocabulary: int) -> None:
    """The same bfloat16 logits on both sides: to float32's rounding."""
    logits, targets = rows((rows_, vocabulary), torch.bfloat16, "cuda")
    logprobs, entropies, _ = logprob_fused.score_rows(logits, targets, 0.7)
    expected = dense(logits, targets, 0.7)
    assert_near(logprobs, expected[0], 1e-5)
    assert_near(entropies, expected[1], 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden_size", [2048, 4096])
def test_peak_memory_is_below_an_eighth_of_the_dense_one(hidden_size: int) -> None:
    """Above the inputs, gradients included; and below one [T, V] of bfloat16, which so never exists."""
    hidden, weight, targets = head(8192, hidden_size)

    def in_full(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logp = torch.log_softmax(torch.nn.functional.linear(hidden, weight).float(), -1)
        return logp.gather(-1, targets[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)

    peaks = []
    for function in (logprob.chunked_logprobs, in_full):
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logprobs, entropies = function(hidden, weight, targets)
        (logprobs.sum() + 0.01 * entropies.sum()).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del logprobs, entropies
    assert peaks[0] < peaks[1] / 8
    assert peaks[0] < 8192 * VOCABULARY * 2
