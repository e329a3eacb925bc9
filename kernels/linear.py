"""The aligned forward for autograd: y = lowbit(x, quantize(W)); dX = dY · Ŵ, dW = dYᵀ · X, Ŵ the dequantized weight.

Gradients pass the rounding of weights and inputs as if it were not there (straight-through estimator). x is saved, and the
codes where the caller keeps them, else the *parameter*: Ŵ is made again in the backward, so that no second copy of the
model exists and ZeRO-3 can release the weight in between.

    arithmetic = Arithmetic("w8a8_int8", group=None, backend="engine", dtype=torch.float32)
    prepared = arithmetic.prepare(weight)        # once per version of the weight, to be cached by the caller
    y = aligned_linear(x, weight, bias, arithmetic, prepared)

`torch.compile` does not trace these functions: it breaks its graph before them and calls them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qarl.kernels.dispatch import Backend, Codes, load, quantizer
from qarl.kernels.routing import clear_after, spans, weigh


@dataclass(frozen=True)
class Prepared:
    """One version of a weight: its codes, and the operand that the backend's products take (views of them, if it can)."""

    codes: Codes
    operand: Any
    """Of several shards, one each."""
    shares: tuple[Codes, ...] = ()
    """The codes of each shard once more, where there are several: kernels want them whole."""


@dataclass(frozen=True)
class Arithmetic:
    """How a format's products are computed."""

    format_name: str
    group: int | None
    backend: str
    """A concrete one, from `dispatch.choose`."""
    dtype: torch.dtype
    """Of inputs and outputs."""
    shards: int = 1
    """Ranks of the engine that each hold an equal share of the inputs. A rank rounds its share of x to the activations' grid by
    itself, with scales of its own, and its product to `dtype`; then products are summed."""

    @property
    def module(self) -> Backend:
        return load(self.format_name, self.backend)

    @torch.no_grad()
    def prepare(self, weight: Tensor, before: Prepared | None = None) -> Prepared:
        """weight [N, K], or packed experts [E, N, K]. `before`: of an older version, which nothing computes with any more: on
        CUDA its codes are overwritten, so that they stay where they are. Raises `ValueError` where a shard would cut through a
        group."""
        if self.shards > 1 and self.group and weight.shape[-1] % (self.shards * self.group):
            raise ValueError(
                f"{self.shards} shards of {weight.shape[-1]} inputs would cut through groups of {self.group}"
            )
        if before is not None and weight.is_cuda:
            codes = before.codes
            quantizer(self.format_name, "cuda").quantize_into(weight, self.group, codes)
        else:
            before, codes = None, self.quantize(weight)
        if self.shards == 1:
            return Prepared(codes, self.module.prepare(codes, self.group, self.dtype))
        shares = share_codes(codes, self.shards)
        if before is not None:
            for mine, new in zip(before.shares, shares, strict=True):
                for part, values in mine.items():
                    values.copy_(new[part])
            shares = before.shares
        return Prepared(codes, [self.module.prepare(mine, self.group, self.dtype) for mine in shares], shares)

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> Codes:
        return self.module.quantize(weight, self.group)

    @torch.no_grad()
    def dequantize(self, codes: Codes, dtype: torch.dtype) -> Tensor:
        """Ŵ: the weight as the forward sees it."""
        return self.module.dequantize(codes, self.group, dtype)

    def product(self, x: Tensor, operand: Any, bias: Tensor | None) -> Tensor:
        """y [M, N] from x [M, K], `prepare`'s operand and bias [N], which the first rank adds."""
        if self.shards == 1:
            return self.module.product(x, operand, bias)
        biases = [bias, *[None] * (self.shards - 1)]
        parts = zip(_shares_of(x, self.shards), operand, biases, strict=True)
        return reduce(torch.add, [self.module.product(*part) for part in parts])

    def grouped_products(
        self, x: Tensor, operand: Any, offsets: Tensor, row_weights: Tensor | None
    ) -> tuple[Tensor, ...]:
        """[M, N] of each shard: a rank sums over experts before ranks are summed."""
        if self.shards == 1:
            return (self.module.grouped_product(x, operand, offsets, row_weights),)
        parts = zip(_shares_of(x, self.shards), operand, strict=True)
        return tuple(self.module.grouped_product(*part, offsets, row_weights) for part in parts)


def share_codes(codes: Codes, shards: int) -> tuple[Codes, ...]:
    """Those of each equal share of the inputs, contiguous. What has one entry for all inputs belongs to every share. Raises
    `ValueError` where a share would cut through an entry."""
    uneven = [part for part, values in codes.items() if values.shape[-1] > 1 and values.shape[-1] % shards]
    if uneven:
        raise ValueError(f"{shards} shards of the inputs would cut through an entry of {uneven}")

    def share(values: Tensor, i: int) -> Tensor:
        return values if values.shape[-1] == 1 else values.chunk(shards, -1)[i].contiguous()

    return tuple({part: share(values, i) for part, values in codes.items()} for i in range(shards))


def _shares_of(x: Tensor, shards: int) -> list[Tensor]:
    return [share.contiguous() for share in x.chunk(shards, -1)]


@torch.compiler.disable
def aligned_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, arithmetic: Arithmetic, prepared: Prepared | None = None
) -> Tensor:
    """y [*, N] from x [*, K], weight [N, K], bias [N]. `prepared`: of this very weight; `None`: made here."""
    return _AlignedLinear.apply(x, weight, bias, arithmetic, prepared)


@torch.compiler.disable
def aligned_experts(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    arithmetic: Arithmetic,
    prepared: Prepared | None = None,
    row_weights: Tensor | None = None,
) -> Tensor:
    """y [M, N] from x [M, K] whose rows are sorted by expert, and packed weight [E, N, K].

    offsets [E], integers: where the rows of each expert end (as in `torch._grouped_mm` and transformers' experts). Rows
    after the last belong to no expert; they, and where x is finite their gradients, are zero. An expert without rows has a zero
    gradient.
    row_weights [M] float32, the router's: they multiply the rows of y.
    """
    (y,) = aligned_expert_shards(x, weight, offsets, arithmetic, prepared, row_weights)
    return y


@torch.compiler.disable
def aligned_expert_shards(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    arithmetic: Arithmetic,
    prepared: Prepared | None = None,
    row_weights: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`aligned_experts` where inputs are cut into `arithmetic.shards`: the product [M, N] of each, to be summed."""
    return _AlignedExperts.apply(x, weight, offsets, arithmetic, prepared, row_weights)


def plain_arithmetic(dtype: torch.dtype, shards: int = 1) -> Arithmetic:
    """Of experts that nothing quantizes."""
    return Arithmetic("bf16", None, "plain", dtype, shards)


class _AlignedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, arithmetic: Arithmetic, prepared: Prepared | None
    ) -> Tensor:
        _save(ctx, arithmetic, prepared, weight, x)
        operand = (prepared or arithmetic.prepare(weight)).operand
        y = arithmetic.product(x.reshape(-1, x.shape[-1]), operand, bias)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,), codes = _saved(ctx)
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dx = dy @ ctx.arithmetic.dequantize(codes(), dy.dtype) if needs_x else None
        dw = (rows.t() @ x.reshape(-1, x.shape[-1])).to(ctx.weight_dtype) if needs_weight else None
        return dx, dw, rows.sum(0) if needs_bias else None, None, None


class _AlignedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        offsets: Tensor,
        arithmetic: Arithmetic,
        prepared: Prepared | None,
        row_weights: Tensor | None,
    ) -> tuple[Tensor, ...]:
        _save(ctx, arithmetic, prepared, weight, x, offsets, row_weights)
        operand = (prepared or arithmetic.prepare(weight)).operand
        return arithmetic.grouped_products(x, operand, offsets, row_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        """With router weights w: dX = w · (dY Ŵ), dW = dYᵀ · (w X), dw = ⟨dY Ŵ, X⟩ of each row; of each shard its columns."""
        (x, offsets, row_weights), codes = _saved(ctx)
        needs_x, needs_weight, *_, needs_row_weights = ctx.needs_input_grad
        dys = tuple(dy.contiguous() for dy in dys)
        dx = dw = d_row_weights = None
        if needs_x or needs_row_weights:
            shares = ctx.arithmetic.dequantize(codes(), dys[0].dtype).chunk(len(dys), -1)
            dx = _joined([rows_by_experts(dy, share, offsets) for dy, share in zip(dys, shares, strict=True)])
        if row_weights is not None:
            dx, x, d_row_weights = weigh(x if dx is None else dx, x, row_weights)
        if needs_weight:
            shares = x.chunk(len(dys), -1)
            dw = _joined([experts_of_rows(dy, share, offsets) for dy, share in zip(dys, shares, strict=True)])
            dw = dw.to(ctx.weight_dtype)
        return dx if needs_x else None, dw, None, None, None, d_row_weights if needs_row_weights else None


def _joined(columns: Sequence[Tensor]) -> Tensor:
    return columns[0] if len(columns) == 1 else torch.cat(list(columns), -1)


def rows_by_experts(rows: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """[M, K]: each of `rows` [M, N] times its expert's matrix [E, N, K]; 0 for rows after the last offset."""
    if _has_grouped_mm(rows, matrices.shape[-1]):
        return clear_after(torch._grouped_mm(rows, matrices, offs=offsets.to(torch.int32)), offsets)
    y = rows.new_zeros(len(rows), matrices.shape[-1])
    for expert, own in spans(offsets):
        y[own] = rows[own] @ matrices[expert]
    return y


def experts_of_rows(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """[E, N, K]: aᵀ · b over the rows of each expert; a [M, N], b [M, K]. 0 for an expert without rows."""
    if _has_grouped_mm(a, b.shape[-1]):
        # The rows are the dimension that is summed over. With `a` transposed in place and `b` as it lies, groups may
        # have any number of rows (the other layouts need multiples of 8), and Hopper writes 0 for one that has none.
        return torch._grouped_mm(a.t(), b.contiguous(), offs=offsets.to(torch.int32))
    y = a.new_zeros(len(offsets), a.shape[-1], b.shape[-1])
    for expert, own in spans(offsets):
        y[expert] = a[own].t() @ b[own]
    return y


def _has_grouped_mm(rows: Tensor, n_features: int) -> bool:
    """Whether torch's product runs, which asks for rows of whole 16 bytes. The loop that is left waits for the device."""
    return rows.is_cuda and rows.dtype == torch.bfloat16 and rows.shape[-1] % 8 == n_features % 8 == 0 and len(rows) > 0


def _save(ctx: Any, arithmetic: Arithmetic, prepared: Prepared | None, weight: Tensor, *tensors: Tensor | None) -> None:
    ctx.save_for_backward(*tensors, weight if prepared is None else None)
    ctx.arithmetic, ctx.weight_dtype = arithmetic, weight.dtype
    ctx.codes = None if prepared is None else prepared.codes


def _saved(ctx: Any) -> tuple[list[Tensor], Any]:
    """What `_save` was given, and a function that returns the weight's codes."""
    *tensors, weight = ctx.saved_tensors
    return tensors, lambda: ctx.arithmetic.quantize(weight) if ctx.codes is None else ctx.codes
