"""w4a16 on a GPU, of experts that have few rows each: codes are dequantized in registers, on their way to the tensor core.

To write the weights in 16 bits and read them again, as `w4a16_fused` does, would take several times as long as the rest. Sums are
in another order than there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qarl.kernels.products_fused import expert_tiles
from qarl.kernels.w4a16 import Codes

_FEW, _WORDS = 16, 16
"""Rows of a tile, and words of a step: the fewest that tensor cores multiply."""


def is_for(rows: int, experts: int, words: int, group: int | None) -> bool:
    """Whether it is worth it, few rows an expert; and can be: a step is always a full one, and has whole groups or lies in one."""
    assert group is not None  # _groups has refused it
    whole = words % _WORDS == 0 and (group % (8 * _WORDS) == 0 or 8 * _WORDS % group == 0)
    return whole and rows <= _FEW * experts


def product_of_few(
    x: Tensor, codes: Codes, group: int | None, offsets: Tensor, row_weights: Tensor | None = None
) -> Tensor:
    """y bfloat16 [M, N] = `w4a16.grouped_product` of x bfloat16 [M, K], offsets int32 [E], row_weights [M]; rows after the last
    offset are 0.

    Reads the codes of experts that have rows, once for each `_FEW` rows. K is a multiple of 128, which the group divides or is a
    multiple of (`is_for`).
    """
    packed, scale = codes["weight_packed"].contiguous(), codes["weight_scale"].contiguous()
    m, (n, words) = len(x), packed.shape[-2:]
    y = x.new_empty(m, n)
    with torch.cuda.device_of(x):
        table = expert_tiles(offsets, m, _FEW)
        tiles = table.shape[1]
        _few_rows_kernel[(triton.cdiv(n, 128), tiles)](
            x.view(m, words, 8).permute(2, 0, 1).contiguous(),
            packed,
            scale,
            y,
            y if row_weights is None else row_weights.contiguous(),
            table,
            m,
            n,
            words,
            m * words,
            tiles,
            len(offsets),
            group,
            row_weights is not None,
            BLOCK_M=_FEW,
            BLOCK_N=128,
            WORDS=_WORDS,
            num_warps=4,
            num_stages=3,
        )
    return y


@triton.jit
def _few_rows_kernel(
    x,
    packed,
    scales,
    y,
    row_weights,
    table,
    M,
    N,
    words,
    plane,
    tiles,
    experts,
    GROUP: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WORDS: tl.constexpr,
):
    """y bfloat16 [M, N] = rows times their expert's Ŵ, of packed int32 [E, N, words] and scales bfloat16 [E, N, 8 · words/GROUP].

    x bfloat16 [8, M, words], planes of M · words: the inputs that meet each of a word's eight codes. So a product for each takes
    the words as they lie, with nothing but arithmetic between load and tensor core: to bring codes into the order of the inputs
    costs twice the time. Rows and columns beyond the end are the last ones again, and are not stored.
    """
    tile = tl.program_id(1)
    expert, first, end = tl.load(table + tile), tl.load(table + tiles + tile), tl.load(table + 2 * tiles + tile)
    if first < end:
        row = first + tl.arange(0, BLOCK_M)
        column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (row < end)[:, None] & (column < N)[None, :]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if expert < experts:
            weight_row = expert.to(tl.int64) * N + tl.minimum(column, N - 1)
            x_row = tl.minimum(row, M - 1).to(tl.int64) * words
            groups = 8 * words // GROUP
            GROUPS: tl.constexpr = 8 * WORDS // GROUP
            for start in range(0, words, WORDS):
                word = start + tl.arange(0, WORDS)
                codes = tl.load(packed + weight_row[:, None] * words + word[None, :])
                at = scales + weight_row * groups + 8 * start // GROUP
                if GROUPS > 1:
                    # Of a group once, then spread: as many loads of it as words would take three times as long as the rest.
                    of_group = tl.load(at[:, None] + tl.arange(0, GROUPS)[None, :])[:, :, None]
                    spread = tl.broadcast_to(of_group, (BLOCK_N, GROUPS, WORDS // GROUPS))
                    scale = tl.reshape(spread, (BLOCK_N, WORDS))
                else:
                    scale = tl.load(at)[:, None]
                for code in tl.static_range(8):
                    # 128 to 143 in bfloat16, where integers are neighbours.
                    raised = ((codes >> (4 * code)) & 15 | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
                    weights = (raised - 136.0) * scale
                    rows = tl.load(x + code * plane + x_row[:, None] + word[None, :])
                    acc = tl.dot(rows, weights.T, acc)
        value = acc.to(tl.bfloat16)
        if WEIGHTED:
            last = tl.where(expert < experts, end, 0)
            factor = tl.load(row_weights + row, row < last, other=0).to(tl.bfloat16).to(tl.float32)
            value = (value.to(tl.float32) * factor[:, None]).to(tl.bfloat16)
        tl.store(y + row.to(tl.int64)[:, None] * N + column[None, :], value, inside)
