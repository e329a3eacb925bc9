"""Log-probabilities and entropies of target tokens, a part of the logits at a time: never the logits of all at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def chunked_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, chunk: int = 1024
) -> tuple[Tensor, Tensor]:
    """(logprobs [T], entropies [T]) in nats, float32 (float64 for float64 inputs), both differentiable.

    hidden [T, H] and weight [V, H] (the lm_head) of one dtype; targets [T] int64 in [0, V). The distribution is
    softmax(logits / temperature), as an engine samples: the product in the inputs' dtype, everything after in float32.

    At most chunk · V logits exist at a time, whatever T is: of `chunk` tokens in the forward; of all tokens and a span
    of the vocabulary in the backward, which then writes each row of the weight's gradient once, rounded once, and sums
    only hidden's [T, H] in float32. The backward computes the logits again: four products instead of three.
    Peak memory above inputs and gradients: on CUDA the logits in the inputs' dtype (bfloat16, chunk 1024, V 151 936:
    0.3 GB; of one [T, V] float32 of 32 768 tokens: 20 GB) and that sum; elsewhere three float32 arrays more.
    Raises `ValueError` for a temperature that is not positive.
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
        score_rows = row_functions(hidden.device.type, hidden.dtype)[0]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropies, lse = hidden.new_empty(3, len(hidden), dtype=dtype).unbind()
        for rows in _spans(len(hidden), chunk):
            # The logits have no name here, which would keep a chunk's until after the next one's are made.
            logprobs[rows], entropies[rows], lse[rows] = score_rows(
                F.linear(hidden[rows], weight), targets[rows], temperature
            )
        ctx.save_for_backward(hidden, weight, targets, lse, entropies)
        ctx.temperature, ctx.chunk = temperature, chunk
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_logprobs: Tensor, d_entropies: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, lse, entropies = ctx.saved_tensors
        gradient_rows = row_functions(hidden.device.type, hidden.dtype)[1]
        d_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if ctx.needs_input_grad[0] else None
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        rows = (lse, entropies, d_logprobs, d_entropies)
        for span in _spans(len(weight), _span_length(len(hidden), len(weight), ctx.chunk)):
            d_logits = gradient_rows(
                F.linear(hidden, weight[span]), targets - span.start, *rows, temperature=ctx.temperature
            )
            if d_hidden is not None:
                _add_product(d_hidden, d_logits, weight[span])
            if d_weight is not None:
                torch.mm(d_logits.t(), hidden, out=d_weight[span])
            del d_logits  # before the next span's are made
        return d_hidden if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, None, None, None


def score_rows(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs [R], entropies [R], lse [R]), float32 or wider, of logits [R, V] at `temperature`; targets [R] int64.

    lse is the log Σ exp of the tempered logits. A logit of -inf is a token of probability 0; NaN or +inf makes its row's
    results NaN or infinite and no other's. The logits are not kept intact.
    """
    z = _tempered(logits, temperature)
    lse = z.logsumexp(-1)
    logp = z.sub_(lse[:, None])
    logprobs = logp.gather(-1, targets[:, None]).squeeze(-1)
    entropies = -(logp.exp().mul_(logp.clamp_min(torch.finfo(logp.dtype).min))).sum(-1)
    return logprobs, entropies, lse


def gradient_rows(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    entropies: Tensor,
    d_logprobs: Tensor,
    d_entropies: Tensor,
    temperature: float,
) -> Tensor:
    """d_logits [R, W] in the logits' dtype, from logits [R, W] of W neighbouring tokens; the logits are not kept intact.

    targets [R] count from the first of those tokens: one outside [0, W) is another span's. lse, entropies [R] are those
    of `score_rows`, d_logprobs, d_entropies [R] the gradients of its results. With p the softmax of z = logits /
    temperature: ∂logp/∂z_j = 1[j = target] - p_j, ∂H/∂z_j = -p_j (log p_j + H).
    """
    dtype, width = logits.dtype, logits.shape[-1]
    logp = _tempered(logits, temperature).sub_(lse[:, None])
    p = logp.exp()
    # Times p before times d_entropies: p = 0 is to meet a finite number.
    dz = logp.clamp_min_(torch.finfo(logp.dtype).min).add_(entropies[:, None]).mul_(p).mul_(-d_entropies[:, None])
    dz.addcmul_(p, -d_logprobs[:, None])
    inside = (targets >= 0) & (targets < width)
    dz.scatter_add_(-1, targets.clamp(0, width - 1)[:, None], torch.where(inside, d_logprobs, 0)[:, None])
    return dz.div_(temperature).to(dtype)


def row_functions(device_type: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """(score_rows, gradient_rows) for logits there: one pass of a Triton kernel on CUDA, else the definition above.

    The kernels compute in float32, so float64 is the definition's on any device.
    """
    if device_type != "cuda" or dtype == torch.float64:
        return score_rows, gradient_rows
    from qarl.kernels import logprob_fused

    return logprob_fused.score_rows, logprob_fused.gradient_rows


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total is float32 or wider whatever a and b are."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b  # CPU has no product of 16-bit matrices into float32: each is rounded before it is added


def _span_length(tokens: int, vocabulary: int, chunk: int) -> int:
    """Tokens of the vocabulary at a time, so that logits of all `tokens` are as many as `chunk` whole rows."""
    length = max(1, chunk * vocabulary // max(1, tokens))
    return length // 256 * 256 or length  # of whole tiles, and aligned to the kernels' 16 bytes


def _spans(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
