"""Marlin's order of int4 codes and of their scales, and back: what the engine's kernel on a GPU reads.

The weight lies in tiles of 16 inputs and 64 outputs, each 32 lanes · 4 words in the order in which a warp feeds its tensor
cores. Word (tile, 128·block + 4·lane + j), lane = 4·column + c, holds in nibble b = 4·odd + 2·half + part the code of

    k = 16·tile + 8·part + 2·c + odd,    n = 64·block + 16·j + 8·half + column.

Read off vLLM's `get_weight_perm(4)` and `marlin_weights` (`marlin_utils_test.py`), `gptq_marlin_repack` on a GPU. A nibble is
code + 8 in both orders, so nothing is computed: a permutation of the bits. This is the definition; `marlin_fused.py` does
the same in one pass over memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

_OUTPUTS, _INPUTS = 64, 16
"""A tile's."""


@torch.no_grad()
def pack(codes: Tensor, out: Tensor | None = None) -> Tensor:
    """`weight_packed` int32 [*, N, K/8], of a matrix or of experts -> int32 [*, K/16, 2N], written to `out` if given.

    Raises `ValueError` unless 64 divides N and 16 divides K, and where `out` is not contiguous, of that shape and int32.
    """
    *experts, blocks, tiles = _tiles(codes)
    out = destination(out, codes, (*experts, tiles, 128 * blocks))
    nibbles = (codes.unsqueeze(-1) >> _shifts(codes)) & 15
    # [*, block, j, half, column, tile, part, c, odd]
    nibbles = nibbles.reshape(*experts, blocks, 4, 2, 8, tiles, 2, 4, 2)
    words = _permute(nibbles, (4, 0, 3, 6, 1, 7, 2, 5)).reshape(*out.shape, 8)
    return out.copy_((words << _shifts(codes)).sum(-1, dtype=torch.int32))


@torch.no_grad()
def unpack(packed: Tensor) -> Tensor:
    """int32 [*, K/16, 2N] -> `weight_packed` int32 [*, N, K/8]. Raises `ValueError` unless 64 divides N."""
    *experts, blocks, tiles = _packed_tiles(packed)
    nibbles = (packed.unsqueeze(-1) >> _shifts(packed)) & 15
    # [*, tile, block, column, c, j, odd, half, part]
    nibbles = nibbles.reshape(*experts, tiles, blocks, 8, 4, 4, 2, 2, 2)
    words = _permute(nibbles, (1, 4, 6, 2, 0, 7, 3, 5)).reshape(*experts, 64 * blocks, 2 * tiles, 8)
    return (words << _shifts(packed)).sum(-1, dtype=torch.int32)


@torch.no_grad()
def pack_scales(scales: Tensor, out: Tensor | None = None) -> Tensor:
    """`weight_scale` bfloat16 [*, N, G] of groups along K -> [*, G, N], written to `out` if given. On every device.

    There are two orders (vLLM's `get_scale_perms`). Of several groups, position 8·i + j of each 64 columns holds column
    i + 8·j; of a single one, position 8·i + 2·j + l of each 32 holds column 2·i + 8·j + l. The number of scales says which
    applies, as it does in the engine once its experts are patched (`rollout/patches.py`, `_int4_experts`).

    Raises `ValueError` unless 64 divides N, and for `out` as `pack` does.
    """
    *experts, n, n_groups = scales.shape
    if n % _OUTPUTS:
        raise ValueError(f"Marlin's scales are of outputs in 64s; got {n}")
    out = destination(out, scales, (*experts, n_groups, n))
    columns, order = _columns(n, n_groups)
    there = scales.reshape(*experts, *columns, n_groups)
    here = out.view(*experts, n_groups, *(columns[i] for i in order))
    here.copy_(_permute(there, (len(columns), *order)))
    return out


@torch.no_grad()
def unpack_scales(packed: Tensor) -> Tensor:
    """bfloat16 [*, G, N] -> `weight_scale` [*, N, G]. Raises `ValueError` unless 64 divides N."""
    *experts, n_groups, n = packed.shape
    if n % _OUTPUTS:
        raise ValueError(f"Marlin's scales are of outputs in 64s; got {n}")
    columns, order = _columns(n, n_groups)
    there = packed.reshape(*experts, n_groups, *(columns[i] for i in order))
    back = _permute(there, (*(1 + order.index(i) for i in range(len(columns))), 0))
    return back.reshape(*experts, n, n_groups)


def destination(out: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`out`, or a new tensor; of that shape, else as `like`. Raises `ValueError` where `out` is anything else."""
    if out is None:
        return like.new_empty(shape)
    if (out.shape, out.dtype, out.device) != (shape, like.dtype, like.device) or not out.is_contiguous():
        raise ValueError(
            f"`out` is to be contiguous, {like.dtype}, {list(shape)}, on {like.device}; got {out.dtype}, {list(out.shape)}, "
            f"strides {out.stride()}, on {out.device}"
        )
    return out


def _tiles(codes: Tensor) -> tuple[int, ...]:
    """Of [*, N, K/8]: (*, blocks of outputs, tiles along the inputs)."""
    *experts, n, words = codes.shape
    if codes.dtype != torch.int32 or n % _OUTPUTS or words % 2:
        raise ValueError(
            f"Marlin takes int32 words of N outputs and K inputs, multiples of {_OUTPUTS} and {_INPUTS}; got {codes.dtype}, "
            f"N {n}, K {8 * words}"
        )
    return *experts, n // _OUTPUTS, words // 2


def _packed_tiles(packed: Tensor) -> tuple[int, ...]:
    """Of [*, K/16, 2N], the same."""
    *experts, tiles, words = packed.shape
    if packed.dtype != torch.int32 or words % (2 * _OUTPUTS):
        raise ValueError(
            f"Marlin's words are int32, two for each of N outputs, a multiple of {_OUTPUTS}; got {packed.dtype}, {words} words"
        )
    return *experts, words // (2 * _OUTPUTS), tiles


def _columns(n: int, n_groups: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How N columns divide into dimensions, and the order in which Marlin has these: blocks, i, j (and l)."""
    return ((n // 64, 8, 8), (0, 2, 1)) if n_groups > 1 else ((n // 32, 4, 4, 2), (0, 2, 1, 3))


def _permute(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """The last dimensions, as many as `order` names."""
    first = x.dim() - len(order)
    return x.permute(*range(first), *(first + i for i in order))


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(0, 32, 4, dtype=torch.int32, device=like.device)
