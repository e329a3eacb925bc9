"""The row functions of `logprob.py` in Triton: each reads the logits once, as the product left them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
WARPS = 8
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


def score_rows(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `logprob.score_rows`, float32, of contiguous logits [R, V] of 16 or 32 bits, which are left as they are.

    A target outside [0, V) makes its log-probability NaN. A row with NaN or +inf comes out NaN.
    """
    rows, vocabulary = logits.shape
    logprobs, entropies, lse = logits.new_empty(3, rows, dtype=torch.float32).unbind()
    if rows:
        with torch.cuda.device_of(logits):
            _score_kernel[(rows,)](
                logits,
                targets.contiguous(),
                logprobs,
                entropies,
                lse,
                vocabulary,
                1 / temperature,
                BLOCK,
                num_warps=WARPS,
            )
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
    """As `logprob.gradient_rows`; returns `logits` [R, W], contiguous, overwritten with their gradient."""
    rows, width = logits.shape
    if logits.numel():
        # Autograd hands an expanded number for the gradient of a sum.
        per_row = [each.contiguous() for each in (targets, lse, entropies, d_logprobs, d_entropies)]
        grid = (rows, triton.cdiv(width, BLOCK))
        with torch.cuda.device_of(logits):
            _gradient_kernel[grid](logits, *per_row, width, 1 / temperature, BLOCK, num_warps=WARPS)
    return logits


@triton.jit
def _score_kernel(logits, targets, logprobs, entropies, lse, V, inverse_temperature, BLOCK: tl.constexpr):
    """One row. With m the largest z so far: total = Σ e^(z-m) and moment = Σ e^(z-m) (z-m), rescaled when m grows.

    lse = m + log total and H = log total - moment / total: no difference of large numbers, whatever the logits' size.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    lanes = tl.arange(0, BLOCK)
    m = tl.full([], LOWEST, tl.float32)  # not -inf: a block of -inf alone would be -inf - -inf
    total = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + lanes
        logit = tl.load(logits + columns, mask=columns < V, other=float("-inf"))
        z = logit.to(tl.float32) * inverse_temperature
        larger = tl.maximum(m, tl.max(z, 0))
        shift = tl.maximum(m - larger, LOWEST)
        decay = tl.exp(shift)
        centred = z - larger
        weight = tl.exp(centred)
        moment = decay * moment + (decay * shift) * total + weight * tl.maximum(centred, LOWEST)
        total = decay * total + weight
        m = larger
    sum_total = tl.sum(total, 0)
    log_total = tl.log(sum_total)
    target = tl.load(targets + row)
    logit = tl.load(logits + target, mask=(target >= 0) & (target < V), other=float("nan"))
    tl.store(logprobs + row, logit.to(tl.float32) * inverse_temperature - m - log_total)
    tl.store(entropies + row, log_total - tl.sum(moment, 0) / sum_total)
    tl.store(lse + row, m + log_total)


@triton.jit
def _gradient_kernel(
    logits, targets, lse, entropies, d_logprobs, d_entropies, W, inverse_temperature, BLOCK: tl.constexpr
):
    """A block of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pointers = logits + row * W + columns
    logit = tl.load(pointers, mask=columns < W, other=float("-inf"))
    logp = logit.to(tl.float32) * inverse_temperature - tl.load(lse + row)
    p = tl.exp(logp)
    d_logprob = tl.load(d_logprobs + row)
    # Times p before times the entropy's gradient: p = 0 is to meet a finite number.
    surprise = p * (tl.maximum(logp, LOWEST) + tl.load(entropies + row))
    dz = -d_logprob * p - tl.load(d_entropies + row) * surprise
    dz += tl.where(columns == tl.load(targets + row), d_logprob, 0.0)
    tl.store(pointers, (dz * inverse_temperature).to(logit.dtype), mask=columns < W)
