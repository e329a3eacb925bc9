"""The checksum's sum in one pass over memory: bit for bit that of `checksum.py`.

Programs add their parts to one number as they end, in any order: integers are added modulo 2^64, so it does not show.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qarl.kernels.checksum import GOLDEN, MULTIPLIERS

_BLOCK, _STEPS = 1024, 4
"""Words read at a time, four loads of 16 bytes in each thread of four warps, and how often: one addition for 32 KB."""

# Above 2^63: to Triton these are uint64, in which a shift brings zeros.
_GOLDEN: tl.constexpr = tl.constexpr(GOLDEN)
_FIRST: tl.constexpr = tl.constexpr(MULTIPLIERS[0])
_SECOND: tl.constexpr = tl.constexpr(MULTIPLIERS[1])


def add_words(words: Tensor, total: Tensor) -> Tensor:
    """total int64 [] += Σ mix(word + key(position)), words int64 [n], contiguous. Without host synchronisation."""
    if len(words):
        with torch.cuda.device_of(words):
            _add_words_kernel[(triton.cdiv(len(words), _BLOCK * _STEPS),)](
                words, total, len(words), BLOCK=_BLOCK, STEPS=_STEPS
            )
    return total


@triton.jit
def _add_words_kernel(words, total, n_words, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """words int64 [n_words], total int64 []: STEPS blocks a program."""
    start = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    tl.atomic_add(total, _sum(words, start, n_words, BLOCK, STEPS), sem="relaxed")


@triton.jit
def _sum(words, start, n_words, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """int64: Σ mix(word + key(position)) of STEPS blocks from `start` on, as far as there are words."""
    at = tl.arange(0, BLOCK)
    # Multiplications are what a word costs: the keys of later blocks are this one's plus a constant.
    keys = (start + at).to(tl.uint64) * _GOLDEN
    parts = tl.zeros([BLOCK], tl.uint64)
    for step in tl.static_range(STEPS):
        first = start + step * BLOCK
        there = at < tl.minimum(n_words - first, BLOCK)
        x = tl.load(words + first + at, there, other=0).to(tl.uint64, bitcast=True) + keys
        x = (x ^ (x >> 33)) * _FIRST
        x = (x ^ (x >> 33)) * _SECOND
        parts += tl.where(there, x, 0)
        keys += BLOCK * _GOLDEN % 2**64
    return tl.sum(parts, 0).to(tl.int64, bitcast=True)


def add_tables(pointers: Tensor, counts: Tensor, owners: Tensor, firsts: Tensor, totals: Tensor) -> Tensor:
    """totals int64 [n] += Σ mix(word + key(position)) of each of n tensors, in one launch.

    pointers, counts int64 [n]: where each begins, a multiple of 16, and its words. owners int32, firsts int64 [programs]: of each
    program its tensor and its first word there, `PER_PROGRAM` apart.
    """
    with torch.cuda.device_of(totals):
        _add_tables_kernel[(len(owners),)](pointers, counts, owners, firsts, totals, BLOCK=_BLOCK, STEPS=_STEPS)
    return totals


PER_PROGRAM = _BLOCK * _STEPS
"""Words of a program."""


@triton.jit
def _add_tables_kernel(pointers, counts, owners, firsts, totals, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    owner = tl.load(owners + tl.program_id(0))
    start = tl.load(firsts + tl.program_id(0))
    words = tl.multiple_of(tl.load(pointers + owner), 16).to(tl.pointer_type(tl.int64))
    n_words = tl.load(counts + owner)
    tl.atomic_add(totals + owner, _sum(words, start, n_words, BLOCK, STEPS), sem="relaxed")


@triton.jit
def mixed(word, position):
    """mix(word + key(position)), uint64, of words uint64 at positions int64."""
    x = word + position.to(tl.uint64) * _GOLDEN
    x = (x ^ (x >> 33)) * _FIRST
    return (x ^ (x >> 33)) * _SECOND
