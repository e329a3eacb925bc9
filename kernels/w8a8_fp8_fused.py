"""w8a8_fp8 on Hopper: rows to e4m3 in one pass (Triton), torch's own product of a matrix, experts in Triton.

A tensor core sums e4m3 products in fewer bits than float32, so results equal the definition's to rounding, not to the bit.
Experts are summed and scaled as by vLLM's kernel for them (`products_fused`), a matrix nearly as by vLLM's CUTLASS:
`use_fast_accum` leaves the sum to the tensor core alone, as both of vLLM's kernels do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qarl.kernels import w8a8_fp8
from qarl.kernels.products_fused import MULTIPLE, hopper_refusal, multiply_grouped, pad
from qarl.kernels.rows_fused import dequantize_rows, quantize_rows

Codes = dict[str, Tensor]


@dataclass(frozen=True)
class Operand:
    codes: Tensor
    """float8_e4m3fn [N, K] or [E, N, K]: the weight's own, or a copy with K, and a matrix's N too, padded to multiples of 16:
    torch's and vLLM's products of a matrix want them so."""
    scale: Tensor
    """float32 [N, 1] or [E, N, 1], padded as the codes are."""
    n: int
    """Columns of the result: N before it was padded."""


def quantize(weight: Tensor, group: int | None = None) -> Codes:
    """weight [*, N, K] -> `weight` float8_e4m3fn [*, N, K], `weight_scale` float32 [*, N, 1]: the definition's bits."""
    _no_group(group)
    codes, scale = quantize_rows(weight, "e4m3 weight")
    return {"weight": codes, "weight_scale": scale}


def quantize_into(weight: Tensor, group: int | None, out: Codes) -> None:
    """`quantize`, written into these parts, which are contiguous."""
    _no_group(group)
    quantize_rows(weight, "e4m3 weight", (out["weight"], out["weight_scale"]))


def columns(codes: Codes, group: int | None, at: Tensor) -> Tensor:
    """float32 [*, N, C]: the columns `at` int64 [C] of Ŵ, without the rest of it."""
    return w8a8_fp8.columns(codes, group, at)


def dequantize(codes: Codes, group: int | None, dtype: torch.dtype) -> Tensor:
    """Ŵ [*, N, K] = code · scale in float32, rounded to `dtype`."""
    _no_group(group)
    return dequantize_rows(codes["weight"], codes["weight_scale"], dtype)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes float8_e4m3fn [M, K], scale float32 [M, 1]: vLLM's CUDA op
    `dynamic_per_token_scaled_fp8_quant`, bit for bit; it serves matrices and experts.

    A row with NaN has scale NaN here; vLLM's op takes the largest of the other values.
    """
    return quantize_rows(x, "e4m3 tokens")


def prepare(codes: Codes, group: int | None, dtype: torch.dtype) -> Operand:
    """Codes as the products want them: a matrix or E experts. A view, where nothing must be padded."""
    _no_group(group)
    weight, scale = codes["weight"].contiguous(), codes["weight_scale"].contiguous()
    n, is_matrix = weight.shape[-2], weight.dim() == 2
    if is_matrix and n % MULTIPLE:
        scale = F.pad(scale, (0, 0, 0, -n % MULTIPLE), value=1.0)
    return Operand(pad(weight, rows=is_matrix), scale, n)


@torch.no_grad()
def product(x: Tensor, operand: Operand, bias: Tensor | None = None) -> Tensor:
    """y [M, N] in bfloat16, from x [M, K] (quantized here, per token) and bias [N]. M may be 0."""
    codes, scale = quantize_tokens(x)
    bias = None if bias is None else F.pad(bias.to(torch.bfloat16), (0, -operand.n % MULTIPLE))
    y = torch._scaled_mm(
        pad(codes),
        operand.codes.t(),
        scale_a=scale,
        scale_b=operand.scale.t(),
        bias=bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return y[:, : operand.n].contiguous()


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
        raise ValueError(f"w8a8_fp8 has one scale per output channel, no groups; got group {group}")
