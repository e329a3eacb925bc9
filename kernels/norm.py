"""Root-mean-square norm over the last dimension: `rms_norm` is the definition, `engine_rms_norm` vLLM's own CUDA ops.

They differ: the definition rounds the normalized value before the weight, the ops only after it. And vLLM has two ops, which sum
the squares in two orders: one that norms, one that adds the residual and norms the sum as rounded. Learner and engine add alike, so
the second op gives its bits for the sum and a residual of zero.

In both ops a thread adds eight neighbouring squares, and takes several eights only where a row is longer than 2048: there are 256
threads from 256 rows on, 1024 below. So up to 2048 the bits of a row do not depend on the number of rows; beyond, the engine has
to run steps of 256 tokens or more, and the learner micro-batches (csrc/layernorm_kernels.cu of vllm-project/vllm).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [*, D], weight [D]: x / sqrt(mean x² + eps) in float32, rounded to x's dtype, times the weight; as transformers has it."""
    return weight * _normalize(x, eps)[0].to(x.dtype)


def engine_rms_norm(x: Tensor, weight: Tensor, eps: float, after_addition: bool = False) -> Tensor:
    """The same as vLLM computes it (CUDA, bfloat16 or float16). `after_addition`: x is a sum that vLLM's op makes itself."""
    return _EngineNorm.apply(x, weight, eps, after_addition)


class _EngineNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, after_addition: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _engine_norm(x, weight, eps, after_addition)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return *rms_norm_grads(grad, x, weight, ctx.eps), None, None


def rms_norm_grads(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Of x and of the weight, in their dtypes, by float32 arithmetic.

    With x^ = x r, r = 1 / sqrt(mean x² + eps): dx = r (g - x^ mean(g x^)), g = weight dy; dweight = sum over rows of dy x^.
    """
    normalized, r = _normalize(x, eps)
    grad = grad.float()
    g = grad * weight.float()
    dx = r * (g - normalized * (g * normalized).mean(-1, keepdim=True))
    return dx.to(x.dtype), (grad * normalized).flatten(0, -2).sum(0).to(weight.dtype)


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """float32 [*, D] and its factor [*, 1]."""
    x = x.float()
    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * r, r


def _engine_norm(x: Tensor, weight: Tensor, eps: float, after_addition: bool) -> Tensor:
    """The calls of vLLM's `RMSNorm` without and with a residual."""
    from vllm import _custom_ops as ops

    rows = x.reshape(-1, x.shape[-1])
    if after_addition:
        y = rows.clone()  # written in place, and so is the residual
        ops.fused_add_rms_norm(y, torch.zeros_like(y), weight.to(x.dtype), eps)
    else:
        y = torch.empty_like(rows, memory_format=torch.contiguous_format)
        ops.rms_norm(y, rows, weight.to(x.dtype), eps)
    return y.view(x.shape)
