"""Moving rows to experts and back in one pass over memory each: the copies that torch would make in between are left out.

No atomics: every output element is written once, by one program. Rows of any length, 16 or 32 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_CLEARED = 32
"""Rows that a program of `clear_after` looks after."""


def spread(hidden: Tensor, order: Tensor, top_k: int) -> Tensor:
    """[T · k, H] from hidden [T, H]: row i is that of token order[i] // k. order [T · k] int64."""
    hidden = hidden.contiguous()
    rows = hidden.new_empty(len(order), hidden.shape[1])
    block = _block(hidden.shape[1])
    if rows.numel():
        with torch.cuda.device_of(hidden):
            _spread_kernel[(len(order),)](hidden, order, rows, hidden.shape[1], TOP_K=top_k, BLOCK=block)
    return rows


def collect(rows: Tensor, inverse: Tensor, top_k: int) -> Tensor:
    """[T, H] from rows [T · k, H]: the sum of rows inverse[t k] … inverse[t k + k - 1] in float32, rounded once.

    Added one after the other, in the order of a token's slots, as vLLM's `moe_sum` does.
    """
    rows = rows.contiguous()
    hidden = rows.new_empty(len(inverse) // top_k, rows.shape[1])
    block = _block(rows.shape[1], 1024)
    if hidden.numel():
        grid = (len(hidden), triton.cdiv(rows.shape[1], block))
        with torch.cuda.device_of(rows):
            _collect_kernel[grid](rows, inverse, hidden, rows.shape[1], TOP_K=top_k, BLOCK=block)
    return hidden


def weigh(a: Tensor, b: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(w · a, w · b, ⟨a, b⟩ float32 [M]) of each row of a and b [M, K], weights [M] float32."""
    a, b, weights = a.contiguous(), b.contiguous(), weights.contiguous()
    wa, wb, dot = torch.empty_like(a), torch.empty_like(b), weights.new_empty(len(a))
    if len(a):
        block = _block(a.shape[1], 1024)
        with torch.cuda.device_of(a):
            _weigh_kernel[(len(a),)](a, b, weights, wa, wb, dot, a.shape[1], BLOCK=block)
    return wa, wb, dot


def clear_after(rows: Tensor, offsets: Tensor) -> Tensor:
    """`rows` [M, N], contiguous, with those after the last of `offsets` zeroed, in place. The host need not know which."""
    if rows.numel():
        grid = (triton.cdiv(len(rows), _CLEARED),)
        with torch.cuda.device_of(rows):
            _clear_kernel[grid](
                rows, offsets[-1:], len(rows), rows.shape[1], ROWS=_CLEARED, BLOCK=_block(rows.shape[1])
            )
    return rows


def _block(n_features: int, most: int = 2048) -> int:
    return min(most, triton.next_power_of_2(n_features))


@triton.jit
def _spread_kernel(hidden, order, rows, n_features, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(order + row) // TOP_K
    for start in range(0, n_features, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < n_features
        values = tl.load(hidden + token * n_features + columns, mask=mask)
        tl.store(rows + row * n_features + columns, values, mask=mask)


@triton.jit
def _collect_kernel(rows, inverse, hidden, n_features, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < n_features
    total = tl.zeros([BLOCK], tl.float32)
    for place in tl.static_range(TOP_K):
        row = tl.load(inverse + token * TOP_K + place)
        total += tl.load(rows + row * n_features + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(hidden + token * n_features + columns, total.to(hidden.dtype.element_ty), mask=mask)


@triton.jit
def _weigh_kernel(a, b, weights, wa, wb, dot, n_features, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_features, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < n_features
        at = row * n_features + columns
        x = tl.load(a + at, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(b + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(wa + at, (x * weight).to(wa.dtype.element_ty), mask=mask)
        tl.store(wb + at, (y * weight).to(wb.dtype.element_ty), mask=mask)
        products += x * y
    tl.store(dot + row, tl.sum(products, 0))


@triton.jit
def _clear_kernel(rows, last, n_rows, n_features, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * ROWS
    end = tl.load(last).to(tl.int64)
    for row in range(tl.maximum(first, end), tl.minimum(first + ROWS, n_rows)):
        for start in range(0, n_features, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            zeros = tl.zeros([BLOCK], rows.dtype.element_ty)
            tl.store(rows + row * n_features + columns, zeros, mask=columns < n_features)
