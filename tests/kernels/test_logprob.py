"""Chunked log-probs against the dense computation: values, gradients, and that [T, V] never exists."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qarl.kernels import logprob_fused
from qarl.kernels.logprob import chunked_logprobs, gradient_rows, row_functions, score_rows

T, H, V = 13, 8, 50


def inputs(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(T, H, generator=generator) * scale).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, (T,), generator=generator)


def dense(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(
        (hidden @ weight.t()).to(torch.promote_types(hidden.dtype, torch.float32)) / temperature, -1
    )
    return logp.gather(-1, targets[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("chunk", [1, 4, 13, 1000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_values_and_gradients_equal_the_dense_ones(chunk: int, temperature: float) -> None:
    """Gradients to what a float32 lse of 60, the size at temperature 0.3, leaves of a probability: 1e-5 of it."""
    mix = torch.randn(2, T, generator=torch.Generator().manual_seed(1))
    results = []
    for function in (dense, partial(chunked_logprobs, chunk=chunk)):
        hidden, weight, targets = inputs()
        logprobs, entropies = function(hidden, weight, targets, temperature)
        (logprobs @ mix[0] + entropies @ mix[1]).backward()
        results.append((logprobs, entropies, hidden.grad, weight.grad))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


def test_gradients_in_float64() -> None:
    hidden, weight, targets = inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: chunked_logprobs(h, w, targets, 0.7, 5), (hidden, weight))


@pytest.mark.parametrize("output", [0, 1])
def test_one_output_alone_has_its_gradient(output: int) -> None:
    """Autograd hands zeros for the other."""
    grads = []
    for function in (dense, chunked_logprobs):
        hidden, weight, targets = inputs()
        function(hidden, weight, targets, 1.0)[output].sum().backward()
        grads.append(hidden.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-5)


def test_bfloat16_computes_after_the_product_in_float32() -> None:
    """Equal to the dense one on the same bfloat16 logits; gradients to bfloat16's 2^-8, of the largest."""
    hidden, weight, targets = inputs(torch.bfloat16)
    logprobs, entropies = chunked_logprobs(hidden, weight, targets, 1.0, 4)
    assert logprobs.dtype == entropies.dtype == torch.float32
    expected = dense(hidden, weight, targets, 1.0)
    torch.testing.assert_close(logprobs, expected[0])
    torch.testing.assert_close(entropies, expected[1])
    logprobs.sum().backward()
    ours, hidden.grad = hidden.grad, None
    expected[0].sum().backward()
    theirs = hidden.grad
    assert ours is not None and theirs is not None and ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max()))


def test_peaked_distributions_have_no_nan() -> None:
    """Logits of thousands: probabilities that underflow, an entropy of zero."""
    hidden, weight, targets = inputs(scale=3000)
    logprobs, entropies = chunked_logprobs(hidden, weight, targets, 0.1, 4)
    (logprobs.sum() + entropies.sum()).backward()
    torch.testing.assert_close(logprobs, dense(hidden, weight, targets, 0.1)[0], rtol=1e-4, atol=1e-2)
    assert torch.allclose(entropies, torch.zeros(T), atol=1e-5)
    for leaf in (hidden, weight):
        assert leaf.grad is not None and leaf.grad.isfinite().all()


def test_a_token_of_probability_zero_has_no_gradient() -> None:
    """Logits of -inf, with gradients of entropies above 1: 0 times the lowest float stays 0."""
    logits, targets = torch.randn(2, V), torch.tensor([3, 4])
    logits[:, 10:20] = -math.inf
    logprobs, entropies, lse = score_rows(logits.clone(), targets, 1.0)
    d_entropies = torch.tensor([5.0, -5.0])
    d_logits = gradient_rows(logits.clone(), targets, lse, entropies, torch.ones(2), d_entropies, 1.0)
    assert logprobs.isfinite().all() and entropies.isfinite().all()
    assert d_logits.isfinite().all() and not d_logits[:, 10:20].any()


def test_the_kernels_are_for_cuda_and_what_float32_holds() -> None:
    for device_type, dtype in (("cpu", torch.bfloat16), ("cpu", torch.float32), ("cuda", torch.float64)):
        assert row_functions(device_type, dtype) == (score_rows, gradient_rows)
    for dtype in (torch.bfloat16, torch.float32):
        assert row_functions("cuda", dtype) == (logprob_fused.score_rows, logprob_fused.gradient_rows)


def test_uniform_distribution() -> None:
    hidden, weight = torch.zeros(3, H), torch.randn(V, H)
    logprobs, entropies = chunked_logprobs(hidden, weight, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(-logprobs, torch.full((3,), V).log())
    torch.testing.assert_close(entropies, torch.full((3,), V).log())


def test_no_tokens() -> None:
    weight = torch.randn(V, H, requires_grad=True)
    logprobs, entropies = chunked_logprobs(
        torch.empty(0, H, requires_grad=True), weight, torch.empty(0, dtype=torch.int64)
    )
    (logprobs.sum() + entropies.sum()).backward()
    assert logprobs.shape == entropies.shape == (0,) and weight.grad is not None and not weight.grad.any()


def test_gradients_not_asked_for_are_not_made() -> None:
    hidden, weight, targets = inputs()
    chunked_logprobs(hidden, weight.detach(), targets)[0].sum().backward()
    assert hidden.grad is not None and weight.grad is None


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor):
                self.numel = max(self.numel, each.numel())
        return out


@pytest.mark.parametrize("chunk", [1, 4])
def test_nothing_larger_than_a_chunk_of_logits_exists(chunk: int) -> None:
    """In forward and backward; the weight's gradient [V, H] is the other large thing, here made small."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 2, generator=generator, requires_grad=True)
    weight = torch.randn(500, 2, generator=generator, requires_grad=True)
    with LargestTensor() as seen:
        logprobs, entropies = chunked_logprobs(hidden, weight, torch.zeros(64, dtype=torch.int64), 1.0, chunk)
        (logprobs + entropies).sum().backward()
    assert seen.numel == max(chunk * 500, weight.numel())


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        chunked_logprobs(*inputs(), temperature)


def test_a_chunk_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        chunked_logprobs(*inputs(), 1.0, 0)
