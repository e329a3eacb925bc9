"""w8a8_int8 in Triton: rows to codes in one pass, and products of codes with the scales applied in registers.

The integer sum is exact, so the product is the definition's bit for bit, and vLLM's CUTLASS kernel's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qarl.kernels import w8a8_int8
from qarl.kernels.products_fused import hopper_refusal, multiply, multiply_grouped, pad
from qarl.kernels.rows_fused import dequantize_rows, quantize_rows

Codes = dict[str, Tensor]


@dataclass(frozen=True)
class Operand:
    codes: Tensor
    """int8 [N, K] or [E, N, K]: the weight's own, or a copy where K is no multiple of 16, padded by zeros."""
    scale: Tensor
    """float32 [N, 1] or [E, N, 1]."""
    k: int


def quantize(weight: Tensor, group: int | None = None) -> Codes:
    """weight [*, N, K] -> `weight` int8 [*, N, K], `weight_scale` float32 [*, N, 1]: the definition's bits."""
    _no_group(group)
    codes, scale = quantize_rows(weight, "int8 weight")
    return {"weight": codes, "weight_scale": scale}


def quantize_into(weight: Tensor, group: int | None, out: Codes) -> None:
    """`quantize`, written into these parts, which are contiguous."""
    _no_group(group)
    quantize_rows(weight, "int8 weight", (out["weight"], out["weight_scale"]))


def columns(codes: Codes, group: int | None, at: Tensor) -> Tensor:
    """float32 [*, N, C]: the columns `at` int64 [C] of Ŵ, without the rest of it."""
    return w8a8_int8.columns(codes, group, at)


def dequantize(codes: Codes, group: int | None, dtype: torch.dtype) -> Tensor:
    """Ŵ [*, N, K] = code · scale in float32, rounded to `dtype`."""
    _no_group(group)
    return dequantize_rows(codes["weight"], codes["weight_scale"], dtype)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes int8 [M, K], scale float32 [M, 1]: vLLM's CUDA op `dynamic_scaled_int8_quant`, bit for bit.

    A row with NaN has scale NaN here; vLLM's op loses it.
    """
    return quantize_rows(x, "int8 tokens")


def prepare(codes: Codes, group: int | None, dtype: torch.dtype) -> Operand:
    """Codes as the products want them: a matrix or E experts. A view, where K is a multiple of 16."""
    _no_group(group)
    weight, scale = codes["weight"], codes["weight_scale"]
    return Operand(pad(weight.contiguous()), scale.contiguous(), weight.shape[-1])


@torch.no_grad()
def product(x: Tensor, operand: Operand, bias: Tensor | None = None) -> Tensor:
    """y [M, N] in x's dtype, from x [M, K] (quantized here, per token) and bias [N]. M may be 0."""
    return multiply(*quantize_tokens(x), operand.codes, operand.scale, bias, x.dtype)


@torch.no_grad()
def grouped_product(x: Tensor, operand: Operand, offsets: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """y [M, N] in x's dtype, from x [M, K] with rows sorted by expert, `offsets` [E] where those of each end.

    Rows after the last offset are 0. `row_weights` [M] float32 multiply the result before it is rounded. The offsets
    stay on the device.
    """
    return multiply_grouped(*quantize_tokens(x), operand.codes, operand.scale, offsets, row_weights, x.dtype)


def refusal(device_type: str, dtype: torch.dtype) -> str | None:
    """Why it does not run on that device here for inputs of `dtype`; `None` where it does."""
    return hopper_refusal(device_type, dtype)


def _no_group(group: int | None) -> None:
    if group is not None:
        raise ValueError(f"w8a8_int8 has one scale per output channel, no groups; got group {group}")
