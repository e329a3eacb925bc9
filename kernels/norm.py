"""Root-mean-square norm over the last dimension: `rms_norm` is the definition, `fused_rms_norm` the kernel of learner and engine.

On CUDA both run the one in `norm_fused.py`, the engine by a patch: vLLM's own sums rows longer than 2048 in an order that depends
on how many there are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [*, D], weight [D]: x / sqrt(mean x² + eps) in float32, rounded to x's dtype, times the weight; as transformers has it."""
    return weight * _normalize(x, eps)[0].to(x.dtype)


def fused_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same by one Triton kernel (CUDA), to the last bit of the sum; differentiable."""
    return _FusedNorm.apply(x, weight, eps)


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        from qarl.kernels import norm_fused

        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return norm_fused.rms_norm(x, weight.to(x.dtype), eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return *rms_norm_grads(grad, x, weight, ctx.eps), None


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
