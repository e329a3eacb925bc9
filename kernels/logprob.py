"""Log-probabilities and entropies of target tokens, a chunk of tokens at a time: never the logits of all at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def chunked_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int = 512
) -> tuple[Tensor, Tensor]:
    """(logprobs [T], entropies [T]) in nats, float32 (float64 for float64 inputs), both differentiable.

    hidden [T, H] and weight [V, H] (the lm_head) of one dtype; targets [T] int64. The distribution is
    softmax(logits / temperature), as an engine samples: the product in the inputs' dtype, everything after in float32.

    Peak memory above inputs and gradients: three arrays of [chunk, V] float32, whatever T is (chunk 512, V 151 936:
    0.9 GB; of one [T, V] of 32 768 tokens: 20 GB). The backward computes the logits again: four products instead of
    three. Raises `ValueError` for a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    return _ChunkedLogprobs.apply(hidden, weight, targets, temperature, chunk)


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropies, lse = hidden.new_empty(3, len(hidden), dtype=dtype).unbind()
        for rows in _spans(len(hidden), chunk):
            logits = _logits(hidden[rows], weight, temperature)
            lse[rows] = logits.logsumexp(-1)
            logp = logits.sub_(lse[rows, None])
            logprobs[rows] = logp.gather(-1, targets[rows, None]).squeeze(-1)
            entropies[rows] = _entropy(logp)
        ctx.save_for_backward(hidden, weight, targets, lse, entropies)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprobs: Tensor, d_entropies: Tensor) -> tuple[Tensor | None, ...]:
        """p the softmax of z = logits/temperature: ∂logp/∂z_j = 1[j = target] - p_j, ∂H/∂z_j = -p_j (log p_j + H)."""
        hidden, weight, targets, lse, entropies = ctx.saved_tensors
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Summed in float32 over chunks: in bfloat16 the small ones would be rounded away.
        d_weight = torch.zeros_like(weight, dtype=lse.dtype) if ctx.needs_input_grad[1] else None
        for rows in _spans(len(hidden), ctx.chunk):
            logp = _logits(hidden[rows], weight, ctx.temperature).sub_(lse[rows, None])
            d_logits = logp.exp()
            inner = logp.clamp_min_(torch.finfo(logp.dtype).min).add_(entropies[rows, None])
            d_logits *= inner.mul_(-d_entropies[rows, None]).sub_(d_logprobs[rows, None])
            d_logits.scatter_add_(-1, targets[rows, None], d_logprobs[rows, None])
            d_logits = d_logits.div_(ctx.temperature).to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[rows] = d_logits @ weight
            if d_weight is not None:
                d_weight += d_logits.t() @ hidden[rows]
        return d_hidden, d_weight if d_weight is None else d_weight.to(weight.dtype), None, None, None


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Tempered logits [chunk, V], float32 or wider."""
    logits = F.linear(hidden, weight)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature)


def _entropy(logp: Tensor) -> Tensor:
    """-Σ p log p of log-probabilities [chunk, V]; a token of probability 0 adds nothing."""
    return -(logp.exp().mul_(logp.clamp_min(torch.finfo(logp.dtype).min))).sum(-1)


def _spans(length: int, chunk: int) -> Iterator[slice]:
    return (slice(start, min(start + chunk, length)) for start in range(0, length, chunk))
