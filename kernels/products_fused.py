"""Products of 8-bit codes in Triton, int8 or e4m3, their scales applied in registers. Hopper's tile loads, its tensor cores.

One kernel computes a matrix and packed experts: a matrix is one expert who has all the rows.

int8 is summed in int32: exact, so the result is the definition's bit for bit. e4m3 is summed by the tensor core alone, in
fewer bits than float32: all into one sum, 32 of K at a time in ascending order. So does vLLM's `fused_moe_kernel` on a Hopper,
whatever its tile, and whether it swaps its operands (up to 32 rows): the same instruction (`wgmma`, e4m3), the same bits.
Not so where K is no multiple of both sides' blocks (to add zeros rounds a sum once more), or in a tile of fewer than 64 rows
and columns, which Triton multiplies in float16: our engine takes none (rollout/patches.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

MULTIPLE = 16
"""Bytes to which the hardware's tile loads want rows aligned; and torch's and vLLM's products of e4m3 want N and K so."""


def multiply(
    x: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """y [M, N] of `dtype`, from codes x [M, K] and weight [N, K'], K' = K up to a multiple of 16, filled by zeros.

    Scales float32, x_scale [M, 1] and w_scale [N, 1]; bias [N]. The order of factors is that of `epilogue.rescale`.
    """
    y = torch.empty(len(x), weight.shape[0], dtype=dtype, device=x.device)
    if y.numel():
        with torch.cuda.device_of(x):
            _launch(x, x_scale, weight, w_scale, y, bias, None, None)
    return y


def multiply_grouped(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    offsets: Tensor,
    row_weights: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """y [M, N] of `dtype`: codes x [M, K] with rows sorted by expert, those of each up to offsets [E]; weight [E, N, K'].

    Rows after the last offset are 0. row_weights [M] float32 multiply the result before it is rounded. The order of factors
    is that of `epilogue.rescale_experts`. The offsets stay on the device.
    """
    y = torch.empty(len(x), weight.shape[1], dtype=dtype, device=x.device)
    if not len(offsets):
        return y.zero_()
    if y.numel():
        with torch.cuda.device_of(x):
            _launch(x, x_scale, weight, w_scale, y, None, offsets, row_weights)
    return y


def pad(codes: Tensor, rows: bool = False) -> Tensor:
    """Codes [*, N, K] with K, and N too if `rows`, a multiple of 16: zeros add nothing to a sum."""
    n, k = codes.shape[-2:]
    missing = (0, -k % MULTIPLE, 0, -n % MULTIPLE if rows else 0)
    return F.pad(codes.view(torch.uint8), missing).view(codes.dtype) if any(missing) else codes


def hopper_refusal(device_type: str, dtype: torch.dtype) -> str | None:
    """Why products do not run on that device here for inputs of `dtype`; `None` where they do."""
    if device_type != "cuda":
        return "its Triton kernels run on cuda only"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.cuda.get_device_capability() < (9, 0):
        return "its tile loads need Hopper (compute capability 9.0) or later"
    return None if dtype == torch.bfloat16 else f"it takes torch.bfloat16, not {dtype}"


def _launch(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    w_scale: Tensor,
    y: Tensor,
    bias: Tensor | None,
    offsets: Tensor | None,
    row_weights: Tensor | None,
) -> None:
    x, w = pad(x), weight.view(-1, weight.shape[-1])
    m, n = y.shape
    experts = 0 if offsets is None else len(offsets)
    tile = _tile(m, n, max(experts, 1))
    rows = triton.cdiv(m, tile.m)
    table = x  # any pointer: a matrix's is not read
    if offsets is not None:
        table = expert_tiles(offsets, m, tile.m)
        rows = table.shape[1]
    _multiply[(rows * triton.cdiv(n, tile.n),)](
        TensorDescriptor.from_tensor(x, [tile.m, tile.k]),
        TensorDescriptor.from_tensor(w, [tile.n, tile.k]),
        y,
        x_scale,
        w_scale,
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
        tl.int32 if x.dtype == torch.int8 else tl.float32,
        tile.m,
        tile.n,
        tile.k,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def expert_tiles(offsets: Tensor, m: int, height: int) -> Tensor:
    """int32 [3, tiles]: expert, first row and end of every tile of `height` rows, of m that are sorted by expert; see `_assign`."""
    experts = len(offsets)
    # Each expert, and what follows the last, may end in a tile that is not full.
    table = torch.empty(3, triton.cdiv(m, height) + experts + 1, dtype=torch.int32, device=offsets.device)
    tiles = table.shape[1]
    power = triton.next_power_of_2(experts)
    _assign[(triton.cdiv(tiles, 64),)](offsets, table, m, tiles, experts, height, power, 64)
    return table


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
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y [M, N] = rescaled x · wᵀ, summed in ACC, a tile in each program."""
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
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    # Triton waits for an integer product at the end of every step, though not for one in float32.
    for start in range(0, steps * BLOCK_K, BLOCK_K):
        acc = tl.dot(x_tiles.load([row, start]), w_tiles.load([w_row, start]).T, acc, out_dtype=ACC)
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
