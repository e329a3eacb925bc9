"""Marlin's order of int4 codes and back, in one pass over memory: bit for bit that of `marlin.py`.

A word of Marlin's takes byte c of four words of the codes: two neighbours along the inputs in two rows that are 8 outputs
apart. Four such words are made of those four, so a thread that holds them needs no other: pairs of words exchange nibbles,
halves and bytes. Between the two orders the words pass through shared memory, where Triton changes from a layout in which
reads are contiguous to one in which writes are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qarl.kernels.checksum import length_term
from qarl.kernels.checksum_fused import mixed
from qarl.kernels.marlin import _packed_tiles, _tiles, destination

_BLOCK = 16
"""Tiles along the inputs in a program: 128 contiguous bytes of each of 64 rows."""


@torch.no_grad()
def pack(codes: Tensor, out: Tensor | None = None) -> Tensor:
    """`weight_packed` int32 [*, N, K/8], of a matrix or of experts -> int32 [*, K/16, 2N], written to `out` if given.

    Raises `ValueError` as `marlin.pack` does.
    """
    *experts, blocks, tiles = _tiles(codes)
    out = destination(out, codes, (*experts, tiles, 128 * blocks))
    _launch(_pack_kernel, codes.contiguous(), out, blocks, tiles)
    return out


@torch.no_grad()
def unpack(packed: Tensor) -> Tensor:
    """int32 [*, K/16, 2N] -> `weight_packed` int32 [*, N, K/8]. Raises `ValueError` as `marlin.unpack` does."""
    *experts, blocks, tiles = _packed_tiles(packed)
    codes = packed.new_empty((*experts, 64 * blocks, 2 * tiles))
    _launch(_unpack_kernel, packed.contiguous(), codes, blocks, tiles)
    return codes


@torch.no_grad()
def pending_checksum(packed: Tensor) -> Tensor:
    """`checksum.pending` of `unpack(packed)`, int64 [], without writing that."""
    *experts, blocks, tiles = _packed_tiles(packed)
    total = torch.full((), length_term(packed.nbytes), dtype=torch.int64, device=packed.device)
    _launch(_checksum_kernel, packed.contiguous(), total, blocks, tiles)
    return total


def _launch(kernel: triton.JITFunction, source: Tensor, target: Tensor, blocks: int, tiles: int) -> None:
    if source.numel():
        strips = source.numel() // (128 * tiles)  # of 64 outputs, in all experts
        with torch.cuda.device_of(source):
            kernel[(strips * triton.cdiv(tiles, _BLOCK),)](source, target, blocks, tiles, BLOCK=_BLOCK)


@triton.jit
def _pack_kernel(codes, packed, blocks, tiles, BLOCK: tl.constexpr):
    """codes int32 [E, 64 · blocks, 2 · tiles] -> packed int32 [E, tiles, 128 · blocks]; BLOCK tiles of one strip."""
    rows, there, words, inside = _places(codes, packed, blocks, tiles, BLOCK)
    low_0, low_1 = _pairs(tl.load(rows, there), BLOCK)
    high_0, high_1 = _pairs(tl.load(rows + 16 * tiles, there), BLOCK)
    # b01: in each byte nibbles 0 and 1 of a word of Marlin's.
    b01, b45 = _exchange(low_0, low_1, 4, 0x0F0F0F0F)
    b23, b67 = _exchange(high_0, high_1, 4, 0x0F0F0F0F)
    b01, b45 = _exchange(b01, b45, 16, 0x0000FFFF)
    b23, b67 = _exchange(b23, b67, 16, 0x0000FFFF)
    c0, c1 = _exchange(b01, b23, 8, 0x00FF00FF)
    c2, c3 = _exchange(b45, b67, 8, 0x00FF00FF)
    # [column · j, tile, high bit of c, low bit] -> [tile, column, c, j]
    value = tl.reshape(tl.join(tl.join(c0, c2), tl.join(c1, c3)), (8, 4, BLOCK, 4))
    tl.store(words, tl.reshape(tl.permute(value, (2, 0, 3, 1)), (BLOCK, 128)), inside)


@triton.jit
def _unpack_kernel(packed, codes, blocks, tiles, BLOCK: tl.constexpr):
    """packed int32 [E, tiles, 128 · blocks] -> codes int32 [E, 64 · blocks, 2 · tiles]; BLOCK tiles of one strip."""
    rows, there, words, inside = _places(codes, packed, blocks, tiles, BLOCK)
    low_0, low_1, high_0, high_1 = _unpacked(tl.load(words, inside), BLOCK)
    low, high = tl.join(low_0, low_1), tl.join(high_0, high_1)
    tl.store(rows, tl.reshape(low, (32, 2 * BLOCK)), there)
    tl.store(rows + 16 * tiles, tl.reshape(high, (32, 2 * BLOCK)), there)


@triton.jit
def _checksum_kernel(packed, total, blocks, tiles, BLOCK: tl.constexpr):
    """total int64 [] += the checksum's sum over the codes of BLOCK tiles of one strip, as `_unpack_kernel` would write them."""
    _, _, words, inside = _places(packed, packed, blocks, tiles, BLOCK)
    low_0, low_1, high_0, high_1 = _unpacked(tl.load(words, inside, other=0), BLOCK)
    n_programs = tl.cdiv(tiles, BLOCK)
    strip, first = tl.program_id(0) // n_programs, tl.program_id(0) % n_programs * BLOCK
    row, tile = tl.arange(0, 32), first + tl.arange(0, BLOCK)
    n = strip.to(tl.int64) * 64 + 16 * (row % 4) + row // 4
    position = n[:, None] * tiles + tile[None, :]
    parts = mixed(_word(low_0, low_1), position) + mixed(_word(high_0, high_1), position + 8 * tiles)
    parts = tl.where((tile < tiles)[None, :], parts, 0)
    tl.atomic_add(total, tl.sum(tl.sum(parts, 1), 0).to(tl.int64, bitcast=True), sem="relaxed")


@triton.jit
def _word(low, high):
    """Two int32 as the uint64 that they are in memory, low before high."""
    wide = (high.to(tl.uint32, bitcast=True).to(tl.uint64)) << 32
    return wide | low.to(tl.uint32, bitcast=True).to(tl.uint64)


@triton.jit
def _unpacked(words, BLOCK: tl.constexpr):
    """[BLOCK, 128] of Marlin's -> words of the codes [column · j, BLOCK]: even and odd ones of half 0, and of half 1."""
    value = tl.reshape(words, (BLOCK, 8, 4, 4))
    even, odd = tl.split(tl.reshape(tl.permute(value, (1, 3, 0, 2)), (32, BLOCK, 2, 2)))
    c0, c2 = tl.split(even)
    c1, c3 = tl.split(odd)
    # Each exchange undoes itself.
    b01, b23 = _exchange(c0, c1, 8, 0x00FF00FF)
    b45, b67 = _exchange(c2, c3, 8, 0x00FF00FF)
    b01, b45 = _exchange(b01, b45, 16, 0x0000FFFF)
    b23, b67 = _exchange(b23, b67, 16, 0x0000FFFF)
    low_0, low_1 = _exchange(b01, b45, 4, 0x0F0F0F0F)
    high_0, high_1 = _exchange(b23, b67, 4, 0x0F0F0F0F)
    return low_0, low_1, high_0, high_1


@triton.jit
def _places(codes, packed, blocks, tiles, BLOCK: tl.constexpr):
    """This program's part of both: rows [column · j, 2 · BLOCK] of half 0, words [BLOCK, 128], and what exists of each."""
    n_programs = tl.cdiv(tiles, BLOCK)
    strip, first = tl.program_id(0) // n_programs, tl.program_id(0) % n_programs * BLOCK
    row, word = tl.arange(0, 32), 2 * first + tl.arange(0, 2 * BLOCK)
    n = 16 * (row % 4) + row // 4
    rows = codes + strip.to(tl.int64) * 128 * tiles + (n[:, None] * 2 * tiles + word[None, :])
    there = (word < 2 * tiles)[None, :]
    tile, column = first + tl.arange(0, BLOCK), strip % blocks * 128 + tl.arange(0, 128)
    before = (strip // blocks).to(tl.int64) * tiles  # tiles of the experts before this one
    words = packed + (before + tile)[:, None] * 128 * blocks + column[None, :]
    return rows, there, words, (tile < tiles)[:, None]


@triton.jit
def _pairs(words, BLOCK: tl.constexpr):
    """[32, 2 · BLOCK] -> the even and the odd columns."""
    return tl.split(tl.reshape(words, (32, BLOCK, 2)))


@triton.jit
def _exchange(a, b, BITS: tl.constexpr, MASK: tl.constexpr):
    """The fields of a outside MASK against those of b inside it; fields are of BITS bits. A shift and a LOP3 each."""
    return (a & MASK) | ((b << BITS) & ~MASK), ((a >> BITS) & MASK) | (b & ~MASK)
