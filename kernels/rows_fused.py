"""Rows in 8 bits: codes and a float32 scale for each row, and back. Triton, in one pass over memory.

A weight's row is an output channel, an input's row a token. int8 and e4m3 differ in `_scale` and `_encode` alone. The
row stays in registers between its absmax and its codes: 3 bytes move per element of bfloat16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# The arithmetics, as the kernels see them.
_INT8_WEIGHT: tl.constexpr = tl.constexpr(0)
_INT8_TOKENS: tl.constexpr = tl.constexpr(1)
_E4M3_WEIGHT: tl.constexpr = tl.constexpr(2)
_E4M3_TOKENS: tl.constexpr = tl.constexpr(3)

_RULES = {
    "int8 weight": _INT8_WEIGHT,
    "int8 tokens": _INT8_TOKENS,
    "e4m3 weight": _E4M3_WEIGHT,
    "e4m3 tokens": _E4M3_TOKENS,
}

#: Longest row kept in registers; longer ones are read twice.
_ROW = 12288


@torch.no_grad()
def quantize_rows(x: Tensor, rule: str, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """x [*, K] (cast to bfloat16) -> codes int8 or float8_e4m3fn [*, K], scale float32 [*, 1]; of one of these rules.

    "int8 weight", "e4m3 weight"   scale = absmax / 127 (or 448), 1 for a zero row; code = round(x / scale)
    "int8 tokens"                  scale = absmax / 127; code = round(x · (127 / absmax)), ties to even
    "e4m3 tokens"                  scale = max(absmax / 448, 1 / (448 · 512)); code = round(x / scale)

    Division is IEEE's. A row with NaN has scale NaN, one with inf has inf; no other row changes. `out`: where codes and scale are
    written, contiguous; made here where it is not given.
    """
    x = x.contiguous()
    k, rows = x.shape[-1], x[..., 0].numel()
    dtype = torch.int8 if rule.startswith("int8") else torch.float8_e4m3fn
    if out is None:
        out = x.new_empty(x.shape, dtype=dtype), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    codes, scale = out
    assert codes.is_contiguous() and scale.is_contiguous() and codes.dtype == dtype
    if x.numel():
        # In three parts 768 or 12288 columns leave no lane idle and fewer registers empty.
        parts = 0 if k > _ROW else 3 if k <= 3 * triton.next_power_of_2(k) // 4 else 1
        block, per_program, warps = _tile(k, parts) if parts else _tile(4096)
        with torch.cuda.device_of(x):
            _quantize[(triton.cdiv(rows, per_program),)](
                x, codes, scale, rows, k, _RULES[rule], per_program, block, parts, num_warps=warps
            )
    return codes, scale


@torch.no_grad()
def dequantize_rows(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """codes [*, K], scale float32 [*, 1] -> code · scale in float32, rounded to `dtype`."""
    codes = codes.contiguous()
    k, rows = codes.shape[-1], scale.numel()
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if codes.numel():
        block, per_program, warps = _tile(min(k, 4096))
        grid = (triton.cdiv(rows, per_program), triton.cdiv(k, block))
        with torch.cuda.device_of(codes):
            _dequantize[grid](codes, scale.contiguous(), out, rows, k, per_program, block, num_warps=warps)
    return out


def _tile(k: int, parts: int = 1) -> tuple[int, int, int]:
    """(columns of a part, rows, warps) of a program: one row or 4096 elements of several, 24 to 48 a thread."""
    block = max(triton.next_power_of_2(triton.cdiv(k, parts)), 16)
    rows = max(4096 // (block * triton.next_power_of_2(parts)), 1)
    return block, rows, 8 if rows * block * parts > 6144 else 4


@triton.jit
def _quantize(
    x_ptr,
    codes_ptr,
    scale_ptr,
    rows,
    k,
    RULE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Rows of PARTS blocks, kept in registers; with 0, rows of any length, read twice."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    at = row[:, None] * k + column[None, :]
    mine = (row < rows)[:, None]
    if PARTS:
        values = ()
        for part in tl.static_range(PARTS):
            inside = mine & (column + part * BLOCK < k)[None, :]
            values = values + (_widen(tl.load(x_ptr + at + part * BLOCK, mask=inside, other=0.0)),)  # type: ignore[assignment]
        largest = _magnitude(values[0])  # type: ignore[misc]
        for part in tl.static_range(1, PARTS):
            largest = tl.maximum(largest, _magnitude(values[part]))
        absmax, scale = _scale(tl.max(largest, axis=1), RULE)
        tl.store(scale_ptr + row, scale, mask=row < rows)
        for part in tl.static_range(PARTS):
            inside = mine & (column + part * BLOCK < k)[None, :]
            code = _encode(values[part], absmax[:, None], scale[:, None], RULE)
            tl.store(codes_ptr + at + part * BLOCK, code, mask=inside)
    else:
        largest = tl.zeros([ROWS, BLOCK], tl.int32)
        for start in range(0, k, BLOCK):
            inside = mine & (column + start < k)[None, :]
            value = _widen(tl.load(x_ptr + at + start, mask=inside, other=0.0))
            largest = tl.maximum(largest, _magnitude(value))
        absmax, scale = _scale(tl.max(largest, axis=1), RULE)
        tl.store(scale_ptr + row, scale, mask=row < rows)
        for start in range(0, k, BLOCK):
            inside = mine & (column + start < k)[None, :]
            value = _widen(tl.load(x_ptr + at + start, mask=inside, other=0.0))
            tl.store(codes_ptr + at + start, _encode(value, absmax[:, None], scale[:, None], RULE), mask=inside)


@triton.jit
def _widen(x):
    """float32 of x rounded to bfloat16. By its bits: the interpreter's cast loses numbers below 2^-126."""
    bits = x.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _magnitude(value):
    """|value| as the integer of its bits: the same order, and NaN is largest, where a maximum of floats would lose it."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale(largest, RULE: tl.constexpr):
    """absmax, of which these are the bits, and the scale."""
    absmax = largest.to(tl.float32, bitcast=True)
    if RULE == _E4M3_TOKENS:
        scale = tl.div_rn(absmax, tl.full(absmax.shape, 448.0, tl.float32))
        scale = tl.maximum(scale, 1 / (448.0 * 512.0), propagate_nan=tl.PropagateNan.ALL)
    else:
        limit: tl.constexpr = 448.0 if RULE == _E4M3_WEIGHT else 127.0
        scale = tl.div_rn(absmax, tl.full(absmax.shape, limit, tl.float32))
        if RULE != _INT8_TOKENS:
            scale = tl.where(scale == 0, 1.0, scale)
    return absmax, scale


@triton.jit
def _encode(value, absmax, scale, RULE: tl.constexpr):
    """Codes of value [R, K]; absmax and scale [R, 1]."""
    # All int8 codes of a row that is not finite are 0, which here needs nothing per element: its bounds are.
    limit = tl.where(absmax < float("inf"), 127.0, 0.0)
    if RULE == _E4M3_WEIGHT or RULE == _E4M3_TOKENS:
        value = tl.clamp(_divide(value, scale), -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
        code = value.to(tl.float8e4nv)
    elif RULE == _INT8_WEIGHT:
        code = _round_to_even(tl.minimum(tl.maximum(_divide(value, scale), -limit), limit))
    else:
        inverse = tl.div_rn(tl.full(absmax.shape, 127.0, tl.float32), absmax)
        value = value * tl.where(absmax == 0, 0.0, inverse)
        # Below 4e-37 the inverse is inf: a 0 then is NaN here and shall be code 0, the rest saturates.
        value = tl.where(value == value, value, 0.0)
        code = _round_to_even(tl.minimum(tl.maximum(value, tl.where(limit == 0, 0.0, -128.0)), limit))
    return code


@triton.jit
def _divide(value, scale):
    """value / scale [R, 1], correctly rounded wherever a code depends on it.

    IEEE's division costs ten instructions an element, more than the memory leaves time for. Markstein: a quotient by the
    rounded inverse, its residual by a fused multiply-add, which is exact, and one correction.
    """
    if (tl.min(scale) > 1e-24) & (tl.max(scale) < 1e38):
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        quotient = value * inverse
        # With these signs a quotient of -0 stays what it is. Triton's unary minus is 0 - x, which is no -0.
        residual = tl.fma(quotient, tl.broadcast_to(scale, value.shape), value * -1.0)
        quotient = tl.fma(residual, tl.broadcast_to(inverse * -1.0, value.shape), quotient)
    else:  # the residual might underflow, or there is inf
        quotient = tl.div_rn(value, tl.broadcast_to(scale, value.shape))
    return quotient


@triton.jit
def _round_to_even(value):
    """int8 of |value| <= 128: 1.5 * 2^23 leaves no bits for a fraction, and its own last byte is 0."""
    return (value + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _dequantize(codes_ptr, scale_ptr, out_ptr, rows, k, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row[:, None] * k + column[None, :]
    inside = (row < rows)[:, None] & (column < k)[None, :]
    scale = tl.load(scale_ptr + row, mask=row < rows, other=0.0)
    value = tl.load(codes_ptr + at, mask=inside, other=0.0).to(tl.float32) * scale[:, None]
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)
