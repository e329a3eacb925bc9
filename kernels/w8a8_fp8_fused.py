"""w8a8_fp8 on Hopper: rows to e4m3 in one pass (Triton), and torch's own products with a scale for each row and column.

A tensor core sums e4m3 products in fewer bits than float32 and in an order of its own, so results equal the definition's
and vLLM's to rounding, not to the bit. `use_fast_accum` leaves the sum to the tensor core alone, as vLLM's kernels do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qarl.kernels import w8a8_fp8
from qarl.kernels.routing import clear_after
from qarl.kernels.rows_fused import dequantize_rows, quantize_rows

Codes = dict[str, Tensor]

#: N and K of torch's and of vLLM's products must be multiples of it. What is missing is padded by zeros, as vLLM does.
_MULTIPLE = 16


@dataclass(frozen=True)
class Operand:
    codes: Tensor
    """float8_e4m3fn [N, K] or [E, N, K]: the weight's own, or a copy padded to multiples of 16."""
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
    """Codes as the products want them: a matrix or E experts. A view, where N and K are multiples of 16."""
    _no_group(group)
    weight, scale = codes["weight"].contiguous(), codes["weight_scale"].contiguous()
    n = weight.shape[-2]
    return Operand(pad(weight, rows=True), F.pad(scale, (0, 0, 0, -n % _MULTIPLE), value=1.0), n)


@torch.no_grad()
def product(x: Tensor, operand: Operand, bias: Tensor | None = None) -> Tensor:
    """y [M, N] in bfloat16, from x [M, K] (quantized here, per token) and bias [N]. M may be 0."""
    codes, scale = quantize_tokens(x)
    bias = None if bias is None else F.pad(bias.to(torch.bfloat16), (0, -operand.n % _MULTIPLE))
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
    """y [M, N] in bfloat16, from x [M, K] with rows sorted by expert, `offsets` [E] where those of each end.

    Rows after the last offset are 0. `row_weights` [M] float32 enter with the inputs' scales, so before the result is
    rounded. The offsets stay on the device.
    """
    codes, scale = quantize_tokens(x)
    if not len(x):
        return x.new_empty(0, operand.n)
    scale = scale.squeeze(-1)
    y = torch._scaled_grouped_mm(
        pad(codes),
        operand.codes.transpose(-2, -1),
        scale if row_weights is None else scale * row_weights,
        operand.scale.squeeze(-1),
        offs=offsets.to(torch.int32),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return clear_after(y[:, : operand.n].contiguous(), offsets)


def refusal(device_type: str, dtype: torch.dtype) -> str | None:
    """Why it does not run on that device here for inputs of `dtype`; `None` where it does."""
    if device_type != "cuda":
        return "its kernels run on cuda only"
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
        return "torch's products of e4m3 experts are wired up for Hopper (compute capability 9.0) only"
    return None if dtype == torch.bfloat16 else f"it takes torch.bfloat16, not {dtype}"


def pad(codes: Tensor, rows: bool = False) -> Tensor:
    """e4m3 codes [*, N, K] with K, and N too if `rows`, a multiple of 16."""
    n, k = codes.shape[-2:]
    missing = (0, -k % _MULTIPLE, 0, -n % _MULTIPLE if rows else 0)
    return F.pad(codes.view(torch.uint8), missing).view(torch.float8_e4m3fn) if any(missing) else codes


def _no_group(group: int | None) -> None:
    if group is not None:
        raise ValueError(f"w8a8_fp8 has one scale per output channel, no groups; got group {group}")
