"""What follows the integer (or e4m3) product of two quantized operands: their scales, the bias, the output's dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def rescale(acc: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y [M, N] = acc · w_scale · x_scale + bias in float32, rounded once to `dtype`.

    acc [M, N] float32: the exact sum of code products; x_scale [M, 1] and w_scale [N, 1] float32; bias [N] of any float
    dtype. The order is that of vLLM's CPU op (found by trying all of them against it, bit for bit) and of its
    CUTLASS `ScaledEpilogue`: the weight's scale first, then x_scale and the bias in one fused multiply-add.
    """
    y = acc * w_scale.squeeze(-1)
    if bias is None:
        return (y * x_scale).to(dtype)
    # A product of two float32 is exact in float64, so this rounds where an FMA does (double rounding: 2^-29 of cases).
    return torch.addcmul(bias.double(), y.double(), x_scale.double()).float().to(dtype)


def rescale_experts(
    acc: Tensor, x_scale: Tensor, w_scale: Tensor, row_weights: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """y [M, N] = acc · x_scale · w_scale · row_weights in float32, rounded once to `dtype`. Shapes as in `rescale`.

    row_weights [M] float32. The order is that of vLLM's `fused_moe_kernel`: here the input's scale comes first.
    """
    y = acc * x_scale * w_scale.squeeze(-1)
    return (y if row_weights is None else y * row_weights[:, None]).to(dtype)
