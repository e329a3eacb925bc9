"""w4a16 on a GPU: the weight is quantized or dequantized in one pass, then multiplied by torch's bfloat16 products; for experts of
few rows it is dequantized in registers, by a product of its own.

Marlin, the sampler's kernel, multiplies the same bfloat16 values and is 1.8 x slower than that at training sizes; the two
differ in the order of the float32 sums alone. The 16-bit weight lives for one product.

K is contiguous and a group divides it, so to the kernels a weight of any shape is a list of groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from qarl.kernels import w4a16
from qarl.kernels.w4a16 import Codes, _groups
from qarl.kernels.w4a16_few_fused import is_for, product_of_few

_QUANTIZE = {"tile": 1024, "warps": 1}
_DEQUANTIZE = {"tile": 4096, "warps": 4}
"""Weights per program: four 16-byte loads in flight in each thread. One warp waits for no other where a scale needs a maximum."""


@torch.no_grad()
def quantize(weight: Tensor, group: int | None = None) -> Codes:
    """weight [*, N, K] -> codes equal bit for bit to those of `w4a16.quantize`. Raises `ValueError` as it does."""
    n_groups = _groups(weight.shape[-1], group)
    packed = weight.new_empty((*weight.shape[:-1], weight.shape[-1] // 8), dtype=torch.int32)
    scale = weight.new_empty((*weight.shape[:-1], n_groups), dtype=torch.bfloat16)
    codes = {"weight_packed": packed, "weight_scale": scale}
    quantize_into(weight, group, codes)
    return codes


@torch.no_grad()
def quantize_into(weight: Tensor, group: int | None, out: Codes) -> None:
    """`quantize`, written into these parts, which are contiguous."""
    _groups(weight.shape[-1], group)
    packed, scale = out["weight_packed"], out["weight_scale"]
    assert packed.is_contiguous() and scale.is_contiguous()
    w = weight.to(torch.bfloat16).contiguous()
    if scale.numel():
        grid, blocks = _tiling(scale.numel(), group, **_QUANTIZE)
        with torch.cuda.device_of(w):
            _quantize_kernel[grid](w, packed, scale, scale.numel(), group, **blocks)


@torch.no_grad()
def dequantize(codes: Codes, group: int | None, dtype: torch.dtype) -> Tensor:
    """Ŵ [*, N, K] = code · scale rounded to bfloat16, then cast to `dtype`: that of `w4a16.dequantize`, bit for bit."""
    packed, scale = codes["weight_packed"].contiguous(), codes["weight_scale"].contiguous()
    _groups(8 * packed.shape[-1], group)
    w = scale.new_empty((*packed.shape[:-1], 8 * packed.shape[-1]))
    if scale.numel():
        grid, blocks = _tiling(scale.numel(), group, **_DEQUANTIZE)
        with torch.cuda.device_of(w):
            _dequantize_kernel[grid](packed, scale, w, scale.numel(), group, **blocks)
    return w.to(dtype)


def columns(codes: Codes, group: int | None, at: Tensor) -> Tensor:
    """float32 [*, N, C]: the columns `at` int64 [C] of Ŵ, without the rest of it."""
    return w4a16.columns(codes, group, at)


@dataclass(frozen=True)
class _Operand:
    codes: Codes
    group: int | None

    def weight(self) -> Tensor:
        """[N, K], or [E, N, K] of experts, in bfloat16."""
        return dequantize(self.codes, self.group, torch.bfloat16)


def prepare(codes: Codes, group: int | None, dtype: torch.dtype) -> _Operand:
    """A matrix's codes, or those of E experts, as the products want them: views, no copy."""
    return _Operand(codes, group)


def product(x: Tensor, operand: _Operand, bias: Tensor | None = None) -> Tensor:
    """y [M, N] from x [M, K] and bias [N], all bfloat16. M may be 0."""
    return F.linear(x, operand.weight(), bias)


def grouped_product(x: Tensor, operand: _Operand, offsets: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """y [M, N] from x [M, K] whose rows are sorted by expert: expert e's end at offsets[e], in int32 or int64.

    Rows after the last offset come out 0. row_weights [M], as float32, multiply as in Marlin: y and weight are rounded to
    bfloat16, then their product is. Without host synchronisation on compute capability 9 and 10; elsewhere torch's
    grouped product copies the offsets to the host.

    Few rows, as canaries have, go through `w4a16_few_fused`, which sums in another order.
    """
    experts, n, words = operand.codes["weight_packed"].shape
    if 0 in (*x.shape, experts, n, words):
        return x.new_zeros(len(x), n)
    offsets = offsets.to(torch.int32)
    if is_for(len(x), experts, words, operand.group):
        return product_of_few(x, operand.codes, operand.group, offsets, row_weights)
    weight = operand.weight()
    y = torch._grouped_mm(x.contiguous(), weight.transpose(-2, -1), offs=offsets)
    # A tile of 16 rows loops over the columns: few programs, since all but the last leave at once without row_weights.
    grid = (triton.cdiv(len(y), 16),)
    with torch.cuda.device_of(y):
        _finish_kernel[grid](
            y,
            offsets[-1:],
            y if row_weights is None else row_weights.contiguous(),
            *y.shape,
            y.stride(0),
            WEIGHTED=row_weights is not None,
            ROWS=16,
            COLUMNS=256,
        )
    return y


def refusal(device_type: str, dtype: torch.dtype) -> str | None:
    """Why this backend does not run on that device for inputs of `dtype`; `None` where it does."""
    if device_type != "cuda":
        return "its kernels are for CUDA devices"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.cuda.get_device_capability() < (8, 0):
        return "its bfloat16 products need compute capability 8.0"
    if dtype != torch.bfloat16:
        return "inputs are bfloat16, as in the engine"
    return None


def _tiling(n_groups: int, group: int | None, tile: int, warps: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid, and block sizes with the warps of a program: whole groups, each padded to a power of two of words."""
    assert group is not None  # _groups has refused it
    words = triton.next_power_of_2(group // 8)
    groups = max(1, tile // (8 * words))
    return (triton.cdiv(n_groups, groups),), {"GROUPS": groups, "WORDS": words, "num_warps": warps}


@triton.jit
def _quantize_kernel(weight, packed, scales, n_groups, GROUP: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr):
    """weight bfloat16 [n_groups, GROUP] -> packed int32 [n_groups, GROUP/8], scales bfloat16 [n_groups]."""
    first = tl.program_id(0).to(tl.int64) * GROUPS
    g, word, k = tl.arange(0, GROUPS), tl.arange(0, WORDS), tl.arange(0, 8 * WORDS)
    live = g < tl.minimum(n_groups - first, GROUPS).to(tl.int32)
    at = weight + first * GROUP + g[:, None] * GROUP + k[None, :]
    w = tl.load(at, live[:, None] & (k < GROUP)[None, :], other=0).to(tl.float32)

    # As integers magnitudes keep their order, with NaN, which a maximum of floats drops, above inf.
    absmax = tl.max(w.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
    # Two float32 multiplications by a reciprocal stand for divisions, each off by less than 2^-18. That does not show in
    # bfloat16: an a/b of two 8-bit integers is 2^-17 away from every c · 2^i with an odd 9-bit c, where rounding changes.
    scale = (absmax * (1 / 7.5)).to(tl.bfloat16).to(tl.float32)
    scale = tl.where(scale == 0, 1.0, scale)
    # Quotients in 64ths: the reciprocal of a denormal scale would overflow.
    quotient = (w * tl.div_rn(1 / 64, scale)[:, None]).to(tl.bfloat16).to(tl.float32)
    clamped = tl.minimum(tl.maximum(quotient, -8 / 64), 7 / 64)
    # At 1.5 · 2^17 floats are 64ths apart: the sum is rounded half to even, and its last four bits are code + 8.
    nibbles = (clamped + (1.5 * 2**17 + 8 / 64)).to(tl.int32, bitcast=True) - 0x48400000
    words = tl.sum(tl.reshape(nibbles, (GROUPS, WORDS, 8)) << (4 * tl.arange(0, 8))[None, None, :], 2)
    words = tl.where((absmax < float("inf"))[:, None], words, -0x77777778)  # codes 0: 0 · inf and 0 · NaN are NaN

    at = packed + first * (GROUP // 8) + g[:, None] * (GROUP // 8) + word[None, :]
    tl.store(at, words, live[:, None] & (word < GROUP // 8)[None, :])
    tl.store(scales + first + g, scale.to(tl.bfloat16), live)


@triton.jit
def _dequantize_kernel(
    packed, scales, weight, n_groups, GROUP: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr
):
    """packed int32 [n_groups, GROUP/8], scales bfloat16 [n_groups] -> weight bfloat16 [n_groups, GROUP]."""
    first = tl.program_id(0).to(tl.int64) * GROUPS
    g, word, k = tl.arange(0, GROUPS), tl.arange(0, WORDS), tl.arange(0, 8 * WORDS)
    live = g < tl.minimum(n_groups - first, GROUPS).to(tl.int32)
    at = packed + first * (GROUP // 8) + g[:, None] * (GROUP // 8) + word[None, :]
    words = tl.load(at, live[:, None] & (word < GROUP // 8)[None, :], other=0)
    scale = tl.load(scales + first + g, live, other=0).to(tl.float32)
    codes = ((words[:, :, None] >> (4 * tl.arange(0, 8))[None, None, :]) & 15).to(tl.float32) - 8
    values = tl.reshape((codes * scale[:, None, None]).to(tl.bfloat16), (GROUPS, 8 * WORDS))
    at = weight + first * GROUP + g[:, None] * GROUP + k[None, :]
    tl.store(at, values, live[:, None] & (k < GROUP)[None, :])


@triton.jit
def _finish_kernel(
    y, end, row_weights, M, N, stride, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """y bfloat16 [M, N] in place: rows before `end` times their weight if there is one, the others 0."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)
    used = row < tl.load(end)
    if WEIGHTED or first + ROWS > tl.load(end):
        if WEIGHTED:
            factor = tl.load(row_weights + row, used & (row < M), other=0).to(tl.bfloat16).to(tl.float32)
        for start in range(0, N, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            there = (row < M)[:, None] & (column < N)[None, :]
            at = y + row[:, None] * stride + column[None, :]
            if WEIGHTED:
                value = tl.load(at, there & used[:, None], other=0).to(tl.float32) * factor[:, None]
                tl.store(at, tl.where(used[:, None], value, 0).to(tl.bfloat16), there)
            else:
                tl.store(at, tl.zeros((ROWS, COLUMNS), tl.bfloat16), there & (~used)[:, None])
