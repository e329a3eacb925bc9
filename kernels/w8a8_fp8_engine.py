"""w8a8_fp8 by vLLM's own CUDA kernels, as vLLM 0.26 calls them on Hopper in our engine's settings.

A matrix: `scaled_fp8_quant` per token, then CUTLASS (`CutlassFP8ScaledMMLinearKernel`). Rows are quantized by `fused`'s
kernel, which gives that op's bits sooner. Experts are a Triton kernel in vLLM, on rows that the same op quantizes; here
they are `fused`'s: summed by the tensor core in the same order, and scaled in the same order.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qarl.kernels.dispatch import Codes, quantizer

if TYPE_CHECKING:
    from qarl.kernels.w8a8_fp8_fused import Operand

LEAST_ROWS = 65
"""From so many rows on CUTLASS gives a row the same bits whatever it is computed with.

vLLM chooses a kernel by the number of rows: up to 16, 64, 128 (tiles of 64 x 128 x 128), more (128 x 128 x 128), and from
8192 on with K >= 6144 (256 x 128 x 128). None splits K, and all add to a sum in the tensor core by 32 of K at a time in
ascending order. But up to 64 rows A and B are swapped, and with them the order in which a sum is multiplied by its two
scales: the last bit of some results. (scaled_mm_sm90_fp8_dispatch.cuh of vLLM.) Engine and learner pad to this many rows.
"""


def quantize(weight: Tensor, group: int | None = None) -> Codes:
    """weight [*, N, K] -> the definition's codes; on CUDA by the kernel of `fused`, whose bits are the same."""
    return _rows(weight).quantize(weight, group)


def dequantize(codes: Codes, group: int | None, dtype: torch.dtype) -> Tensor:
    """Ŵ [*, N, K], likewise."""
    return _rows(codes["weight"]).dequantize(codes, group, dtype)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes float8_e4m3fn [M, K], scale float32 [M, 1], likewise: those of vLLM's op."""
    return _rows(x).quantize_tokens(x)


def _rows(x: Tensor) -> Any:
    """The module to quantize x with."""
    return quantizer("w8a8_fp8", x.device.type)


def prepare(codes: Codes, group: int | None, dtype: torch.dtype) -> Operand:
    """Codes as the products want them, a matrix or E experts: a view where nothing must be padded.

    Raises `ValueError` where it does not run."""
    if reason := refusal(codes["weight"].device.type, dtype):
        raise ValueError(f"w8a8_fp8 cannot use backend 'engine': {reason}")
    from qarl.kernels import w8a8_fp8_fused

    return w8a8_fp8_fused.prepare(codes, group, dtype)


def product(x: Tensor, operand: Operand, bias: Tensor | None = None) -> Tensor:
    """y [M, N] in bfloat16, from x [M, K] (quantized here, per token) and bias [N]. M may be 0."""
    return _product_engine(x, operand, bias) if len(x) else x.new_empty(0, operand.n)


def grouped_product(x: Tensor, operand: Operand, offsets: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """y [M, N] in bfloat16: rows sorted by expert, `offsets` [E] where those of each end; rows after the last are 0.

    `row_weights` [M] float32 multiply the result before it is rounded.
    """
    from qarl.kernels import w8a8_fp8_fused

    return w8a8_fp8_fused.grouped_product(x, operand, offsets, row_weights)


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
    """vLLM's `FP8ScaledMMLinearKernel.apply_weights` and `CutlassFP8ScaledMMLinearKernel.apply_scaled_mm`, the latter
    as our engine patches it: on `LEAST_ROWS` rows or more."""
    from vllm import _custom_ops as ops

    from qarl.kernels.products_fused import pad

    rows, columns = len(x), operand.codes.shape[0]
    if rows < LEAST_ROWS:
        x = F.pad(x, (0, 0, 0, LEAST_ROWS - rows))
    codes, scale = quantize_tokens(x)
    bias = None if bias is None else F.pad(bias, (0, columns - operand.n))
    y = ops.cutlass_scaled_mm(pad(codes), operand.codes.t(), scale, operand.scale, x.dtype, bias)
    return y[:rows, : operand.n].contiguous()
