"""The aligned forward for autograd: y = lowbit(x, quantize(W)); dX = dY · Ŵ, dW = dYᵀ · X, Ŵ the dequantized weight.

Gradients pass the rounding of weights and inputs as if it were not there (straight-through estimator). Only x and the
*parameter* are saved: Ŵ is made again in the backward, so that ZeRO-3 can release the weight in between.

    arithmetic = Arithmetic(kernel("w8a8_int8"), group=None, backend="engine", dtype=torch.float32)
    prepared = arithmetic.prepare(weight)        # once per version of the weight, to be cached by the caller
    y = aligned_linear(x, weight, bias, arithmetic, prepared)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qarl.kernels.dispatch import Kernel


@dataclass(frozen=True)
class Arithmetic:
    """A format's kernel with everything it is computed by."""

    kernel: Kernel
    group: int | None
    backend: str
    """A concrete one, from `dispatch.choose`."""
    dtype: torch.dtype
    """Of inputs and outputs."""

    @torch.no_grad()
    def prepare(self, weight: Tensor) -> Any:
        """Quantized and laid out for the product: a matrix [N, K] gives one object, experts [E, N, K] a list of E."""
        codes = self.kernel.quantize(weight, self.group)
        if weight.dim() == 2:
            return self.kernel.prepare(codes, self.group, self.backend, self.dtype)
        experts = ({part: tensor[e] for part, tensor in codes.items()} for e in range(len(weight)))
        return [self.kernel.prepare(each, self.group, self.backend, self.dtype) for each in experts]

    @torch.no_grad()
    def on_grid(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Ŵ: the weight as the forward sees it."""
        return self.kernel.dequantize(self.kernel.quantize(weight, self.group), self.group, dtype)


def aligned_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, arithmetic: Arithmetic, prepared: Any | None = None
) -> Tensor:
    """y [*, N] from x [*, K], weight [N, K], bias [N]. `prepared`: of this very weight; `None`: made here."""
    return _AlignedLinear.apply(x, weight, bias, arithmetic, prepared)


def aligned_experts(
    x: Tensor, weight: Tensor, offsets: Tensor, arithmetic: Arithmetic, prepared: list[Any] | None = None
) -> Tensor:
    """y [M, N] from x [M, K] whose rows are sorted by expert, and packed weight [E, N, K].

    offsets [E], integers: where the rows of each expert end (as in `torch._grouped_mm` and transformers' experts). Rows
    after the last belong to no expert; they and their gradients are zero. An expert without rows has a zero gradient.
    """
    return _AlignedExperts.apply(x, weight, offsets, arithmetic, prepared)


class _AlignedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, arithmetic: Arithmetic, prepared: Any | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.arithmetic = arithmetic
        prepared = arithmetic.prepare(weight) if prepared is None else prepared
        y = arithmetic.kernel.product(x.reshape(-1, x.shape[-1]), prepared, bias)
        return y.view(*x.shape[:-1], -1) if x.numel() else y.new_empty(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        rows = dy.reshape(-1, dy.shape[-1])
        dx = dy @ ctx.arithmetic.on_grid(weight, dy.dtype) if needs_x else None
        dw = (rows.t() @ x.reshape(-1, x.shape[-1])).to(weight.dtype) if needs_weight else None
        return dx, dw, rows.sum(0) if needs_bias else None, None, None


class _AlignedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        offsets: Tensor,
        arithmetic: Arithmetic,
        prepared: list | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, offsets)
        ctx.arithmetic = arithmetic
        prepared = arithmetic.prepare(weight) if prepared is None else prepared
        y = x.new_zeros(len(x), weight.shape[1])
        for expert, rows in _spans(offsets):
            y[rows] = arithmetic.kernel.product(x[rows], prepared[expert], None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offsets = ctx.saved_tensors
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        dx = torch.zeros_like(x) if needs_x else None
        dw = torch.zeros_like(weight) if needs_weight else None
        for expert, rows in _spans(offsets):
            if dx is not None:
                dx[rows] = dy[rows] @ ctx.arithmetic.on_grid(weight[expert], dy.dtype)
            if dw is not None:
                dw[expert] = dy[rows].t() @ x[rows]
        return dx, dw, None, None, None


def _spans(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of the experts that have any. Waits for the device: the loop is on the host."""
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end
