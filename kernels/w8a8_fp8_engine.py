"""w8a8_fp8 by vLLM's own CUDA ops, called as vLLM 0.26 calls them on Hopper.

A matrix: `scaled_fp8_quant` per token, then CUTLASS (`CutlassFP8ScaledMMLinearKernel`; Marlin and FlashInfer come before
it in vLLM's list, but refuse such a GPU). Experts: `CutlassExpertsFp8`, which is `cutlass_moe_mm` for both products.

vLLM's experts multiply by the router's weights when they sum each token's rows, in float32, from rows that are rounded
already. To follow that to the last bit, ask for no `row_weights` here and weigh the rows in that sum.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from qarl.kernels.routing import clear_after
from qarl.kernels.w8a8_fp8 import Codes, dequantize, quantize, quantize_tokens

if TYPE_CHECKING:
    from qarl.kernels.w8a8_fp8_fused import Operand

__all__ = ["dequantize", "grouped_product", "prepare", "product", "quantize", "quantize_tokens", "refusal"]

#: Up to here vLLM has the grouped product compute yᵀ, whose smallest tile is smaller.
_TRANSPOSED_ROWS = 64


def prepare(codes: Codes, group: int | None, dtype: torch.dtype) -> Operand:
    """Codes as the products want them, a matrix or E experts: a view where N and K are multiples of 16, else padded, as
    by vLLM. Raises `ValueError` where it does not run."""
    if reason := refusal(codes["weight"].device.type, dtype):
        raise ValueError(f"w8a8_fp8 cannot use backend 'engine': {reason}")
    from qarl.kernels import w8a8_fp8_fused

    return w8a8_fp8_fused.prepare(codes, group, dtype)


def product(x: Tensor, operand: Operand, bias: Tensor | None = None) -> Tensor:
    """y [M, N] in bfloat16, from x [M, K] (quantized here, per token) and bias [N]. M may be 0."""
    return _product_engine(x, operand, bias) if len(x) else x.new_empty(0, operand.n)


def grouped_product(x: Tensor, operand: Operand, offsets: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """y [M, N] in bfloat16: rows sorted by expert, `offsets` [E] where those of each end; rows after the last are 0.

    `row_weights` [M] float32 enter with the inputs' scales: before the result is rounded.
    """
    if not len(x):
        return x.new_empty(0, operand.n)
    return clear_after(_grouped_product_engine(x, operand, offsets, row_weights), offsets)


def refusal(device_type: str, dtype: torch.dtype) -> str | None:
    """Why it does not run on that device here for inputs of `dtype`; `None` where it does. Asking imports vLLM."""
    if reason := _engine_refusal(device_type):
        return reason
    return None if dtype == torch.bfloat16 else f"it takes torch.bfloat16, not {dtype}"


@cache
def _engine_refusal(device_type: str) -> str | None:
    if device_type != "cuda":
        return f"vLLM's op is wired up for cuda only, not for {device_type}"
    if find_spec("vllm") is None:
        return "vLLM is not installed"
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return "this vLLM is not a CUDA build, or there is no GPU"
    if not current_platform.is_device_capability(90):
        return "vLLM takes other kernels on a GPU that is not a Hopper, which are not wired up"
    return None


@torch.no_grad()
def _product_engine(x: Tensor, operand: Operand, bias: Tensor | None) -> Tensor:
    """The calls of vLLM's `FP8ScaledMMLinearKernel.apply_weights` and `CutlassFP8ScaledMMLinearKernel.apply_scaled_mm`."""
    from vllm import _custom_ops as ops

    from qarl.kernels.w8a8_fp8_fused import pad

    codes, scale = ops.scaled_fp8_quant(x.contiguous(), use_per_token_if_dynamic=True)
    columns = operand.codes.shape[0]
    bias = None if bias is None else F.pad(bias, (0, columns - operand.n))
    y = ops.cutlass_scaled_mm(pad(codes), operand.codes.t(), scale, operand.scale, x.dtype, bias)
    return y[:, : operand.n].contiguous()


@torch.no_grad()
def _grouped_product_engine(x: Tensor, operand: Operand, offsets: Tensor, row_weights: Tensor | None) -> Tensor:
    """One of the two products of vLLM's `run_cutlass_moe_fp8`. Rows after the last offset are left as they were."""
    from vllm import _custom_ops as ops

    from qarl.kernels.w8a8_fp8_fused import pad

    codes, scale = ops.scaled_fp8_quant(x.contiguous(), use_per_token_if_dynamic=True)
    codes = pad(codes)
    experts, n, k = operand.codes.shape
    ends = offsets.long()
    starts = F.pad(ends[:-1], (1, 0))
    sizes = torch.empty(experts, 3, dtype=torch.int32, device=x.device)
    rows, columns = (1, 0) if len(x) <= _TRANSPOSED_ROWS else (0, 1)
    sizes[:, rows], sizes[:, columns], sizes[:, 2] = ends - starts, n, k
    y = x.new_empty(len(x), n)
    along_k, along_n = torch.full_like(ends, k), torch.full_like(ends, n)
    scale = scale if row_weights is None else scale * row_weights[:, None]
    ops.cutlass_moe_mm(
        y, codes, operand.codes, scale, operand.scale, starts, sizes, along_k, along_k, along_n, True, True
    )
    return y[:, : operand.n].contiguous()
