"""w8a8_int8 in Triton: rows to codes in one pass, and products of codes with the scales applied in registers.

The integer sum is exact, so the product is the definition's bit for bit, and vLLM's CUTLASS kernel's. One kernel computes
a matrix and packed experts: a matrix is one expert who has all the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qarl.kernels import w8a8_int8
from qarl.kernels.rows_fused import dequantize_rows, quantize_rows

Codes = dict[str, Tensor]

#: Bytes to which the hardware's tile loads want rows aligned.
_ALIGNMENT = 16


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
    return Operand(_pad(weight.contiguous()), scale.contiguous(), weight.shape[-1])


@torch.no_grad()
def product(x: Tensor, operand: Operand, bias: Tensor | None = None) -> Tensor:
    """y [M, N] in x's dtype, from x [M, K] (quantized here, per token) and bias [N]. M may be 0."""
    return multiply(*quantize_tokens(x), operand, bias, x.dtype)


@torch.no_grad()
def grouped_product(x: Tensor, operand: Operand, offsets: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """y [M, N] in x's dtype, from x [M, K] with rows sorted by expert, `offsets` [E] where those of each end.

    Rows after the last offset are 0. `row_weights` [M] float32 multiply the result before it is rounded. The offsets
    stay on the device.
    """
    return multiply_grouped(*quantize_tokens(x), operand, offsets, row_weights, x.dtype)


def multiply(codes: Tensor, scale: Tensor, operand: Operand, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y [M, N]: `product` of inputs that are codes already, int8 [M, K] with scale [M, 1]."""
    m, n = len(codes), operand.codes.shape[0]
    y = torch.empty(m, n, dtype=dtype, device=codes.device)
    if m and n:
        _launch(codes, scale, operand, y, bias, None, None)
    return y


def multiply_grouped(
    codes: Tensor, scale: Tensor, operand: Operand, offsets: Tensor, row_weights: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """y [M, N]: `grouped_product` of inputs that are codes already."""
    m, n = len(codes), operand.codes.shape[1]
    y = torch.empty(m, n, dtype=dtype, device=codes.device)
    if m and n:
        _launch(codes, scale, operand, y, None, offsets, row_weights)
    return y


def refusal(device_type: str, dtype: torch.dtype) -> str | None:
    """Why it does not run on that device for inputs of `dtype`; `None` where it does."""
    if device_type != "cuda":
        return "its Triton kernels run on cuda only"
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        return "its tile loads need Hopper (compute capability 9.0) or later"
    return None if dtype == torch.bfloat16 else f"it takes torch.bfloat16, not {dtype}"


def _launch(
    x: Tensor,
    x_scale: Tensor,
    operand: Operand,
    y: Tensor,
    bias: Tensor | None,
    offsets: Tensor | None,
    row_weights: Tensor | None,
) -> None:
    x, w = _pad(x), operand.codes.view(-1, operand.codes.shape[-1])
    m, n = y.shape
    experts = 0 if offsets is None else len(offsets)
    tile = _tile(m, n, max(experts, 1))
    rows = triton.cdiv(m, tile.m)
    table = x  # any pointer: a matrix's is not read
    if offsets is not None:
        # Each expert, and what follows the last, may end in a tile that is not full.
        rows += experts + 1
        table = torch.empty(3, rows, dtype=torch.int32, device=x.device)
        power = triton.next_power_of_2(experts)
        _assign[(triton.cdiv(rows, 64),)](offsets, table, m, rows, experts, tile.m, power, 64)
    _multiply[(rows * triton.cdiv(n, tile.n),)](
        TensorDescriptor.from_tensor(x, [tile.m, tile.k]),
        TensorDescriptor.from_tensor(w, [tile.n, tile.k]),
        y,
        x_scale,
        operand.scale,
        y if bias is None else bias.contiguous(),
        y if row_weights is None else row_weights.contiguous(),
        table,
        m,
        n,
        x.shape[1],
        rows,
        experts,
        bias is not None,
        row_weights is not None,
        offsets is not None,
        tile.m,
        tile.n,
        tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


class _Tile(NamedTuple):
    m: int
    n: int
    k: int
    warps: int
    stages: int


def _tile(m: int, n: int, experts: int) -> _Tile:
    """The smaller one for experts of few rows, and where tiles of the larger are so few that some processors would idle: each
    computes two at a time, and there are 132."""
    few = m <= 64 * experts or m * n < 4 * 132 * 128 * 128
    return _Tile(64, 128, 128, 4, 4) if few else _Tile(128, 128, 128, 4, 3)


def _pad(codes: Tensor) -> Tensor:
    """[*, K] with K a multiple of 16: zeros add nothing to a sum."""
    missing = -codes.shape[-1] % _ALIGNMENT
    return F.pad(codes, (0, missing)) if missing else codes


@triton.jit
def _assign(offsets_ptr, table_ptr, m, tiles, experts, BLOCK_M: tl.constexpr, POWER: tl.constexpr, TILES: tl.constexpr):
    """table [3, tiles]: each tile's expert, first row and end. Expert E has the rows after the last offset; what tiles
    are left over begin at or beyond m."""
    expert = tl.arange(0, POWER)
    known = expert < experts
    end = tl.load(offsets_ptr + expert, mask=known, other=0).to(tl.int32)
    start = tl.load(offsets_ptr + expert - 1, mask=known & (expert > 0), other=0).to(tl.int32)
    upto = tl.cumsum(tl.cdiv(end - start, BLOCK_M), 0)
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    mine = tile < tiles
    passed = known[None, :] & (upto[None, :] <= tile[:, None])
    owner = tl.sum(passed.to(tl.int32), 1)
    skipped = tl.max(tl.where(passed, upto[None, :], 0), 1)
    before = tl.load(offsets_ptr + owner - 1, mask=mine & (owner > 0), other=0).to(tl.int32)
    stop = tl.load(offsets_ptr + owner, mask=mine & (owner < experts), other=0).to(tl.int32)
    tl.store(table_ptr + tile, owner, mask=mine)
    tl.store(table_ptr + tiles + tile, before + (tile - skipped) * BLOCK_M, mask=mine)
    tl.store(table_ptr + 2 * tiles + tile, tl.where(owner < experts, stop, m), mask=mine)


@triton.jit
def _multiply(
    x_tiles,
    w_tiles,
    y_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    row_weights_ptr,
    table_ptr,
    m,
    n,
    k,
    tiles,
    experts,
    BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y [M, N] = rescaled x · wᵀ, a tile in each program."""
    columns = tl.cdiv(n, BLOCK_N)
    tile, block = _place(tl.program_id(0), tiles, columns)
    row, column = tile * BLOCK_M, block * BLOCK_N
    w_row = column
    end, last_row, last_column = m, m, n  # of the rows to be stored; of those that have a weight; its columns
    steps = tl.cdiv(k, BLOCK_K)
    if GROUPED:
        expert = tl.load(table_ptr + tile)
        row = tl.load(table_ptr + tiles + tile)
        end = tl.load(table_ptr + 2 * tiles + tile)
        w_row = expert * n + column
        last_row = tl.where(expert < experts, end, 0)
        last_column = tl.where(row < last_row, n, 0)
        steps = tl.where(row < last_row, steps, 0)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    # Triton waits for an integer product at the end of every step, though not for one in float32.
    for start in range(0, steps * BLOCK_K, BLOCK_K):
        acc = tl.dot(x_tiles.load([row, start]), w_tiles.load([w_row, start]).T, acc, out_dtype=tl.int32)
    y_row = row + tl.arange(0, BLOCK_M)
    y_column = column + tl.arange(0, BLOCK_N)
    x_scale = tl.load(x_scale_ptr + y_row, mask=y_row < last_row, other=0.0)
    w_scale = tl.load(w_scale_ptr + w_row + tl.arange(0, BLOCK_N), mask=y_column < last_column, other=0.0)
    y = acc.to(tl.float32)
    if GROUPED:
        # As vLLM's kernel for experts, whose order is not that of its kernel for a matrix.
        y = y * x_scale[:, None] * w_scale[None, :]
        if WEIGHTED:
            y = y * tl.load(row_weights_ptr + y_row, mask=y_row < last_row, other=0.0)[:, None]
    elif BIAS:
        bias = tl.load(bias_ptr + y_column, mask=y_column < n, other=0.0).to(tl.float32)
        y = _multiply_add(y * w_scale[None, :], x_scale[:, None], bias[None, :])
    else:
        y = y * w_scale[None, :] * x_scale[:, None]
    inside = (y_row < end)[:, None] & (y_column < n)[None, :]
    tl.store(y_ptr + y_row.to(tl.int64)[:, None] * n + y_column[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _multiply_add(y, factor, term):
    return tl.fma(y, tl.broadcast_to(factor, y.shape), tl.broadcast_to(term, y.shape))


@triton.jit
def _place(index, tiles, columns):
    """Tile and column of the index-th: down 8 tiles before the next column, so that what they share stays in the cache."""
    band = index // (8 * columns)
    height = tl.minimum(tiles - band * 8, 8)
    within = index % (8 * columns)
    return band * 8 + within % height, within // height


def _no_group(group: int | None) -> None:
    if group is not None:
        raise ValueError(f"w8a8_int8 has one scale per output channel, no groups; got group {group}")
