"""Tokens to experts and back: rows sorted by expert, and the sum over the experts of each token.

Nothing here is added up in an order that changes from run to run, and on CUDA nothing waits for the device (but `spans`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Routing:
    """T tokens, each sent to `top_k` of E experts: T · top_k rows. A slot is token · top_k + place."""

    order: Tensor
    """int64 [T · top_k]: the slot of each row, rows sorted by expert and in the order of tokens within one."""
    inverse: Tensor
    """int64 [T · top_k]: the row of each slot."""
    offsets: Tensor
    """int32 [E]: where the rows of each expert end."""
    top_k: int


def route(top_k_index: Tensor, n_experts: int) -> Routing:
    """top_k_index [T, top_k], integers: the experts of each token."""
    expert, order = top_k_index.flatten().to(torch.int32).sort(stable=True)
    rows = torch.arange(len(order), device=order.device)
    inverse = torch.empty_like(order).scatter_(0, order, rows)
    # Not `bincount`, which waits for the device to learn the size of its result.
    experts = torch.arange(n_experts, dtype=torch.int32, device=order.device)
    offsets = torch.searchsorted(expert, experts, right=True, out_int32=True)
    return Routing(order, inverse, offsets, top_k_index.shape[-1])


def spread(hidden: Tensor, routing: Routing) -> Tensor:
    """[T · top_k, H] from hidden [T, H]: each row's token. Backward: `collect`."""
    return _Spread.apply(hidden, routing)


def collect(rows: Tensor, routing: Routing) -> Tensor:
    """[T, H] from rows [T · top_k, H]: the sum over each token's rows, in float32, rounded once. Backward: `spread`."""
    return _Collect.apply(rows, routing)


def row_weights(top_k_weights: Tensor, routing: Routing) -> Tensor:
    """float32 [T · top_k] from the router's weights [T, top_k]: each row's."""
    return _RowWeights.apply(top_k_weights, routing)


def clear_after(rows: Tensor, offsets: Tensor) -> Tensor:
    """`rows` [M, N] with those after the last offset zeroed, in place."""
    if rows.is_cuda:
        from qarl.kernels import routing_fused

        return routing_fused.clear_after(rows, offsets)
    rows[int(offsets[-1]) :] = 0
    return rows


def weigh(a: Tensor, b: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(w · a, w · b, ⟨a, b⟩ float32 [M]) of each row of a and b [M, K], weights [M] float32."""
    if a.is_cuda:
        from qarl.kernels import routing_fused

        return routing_fused.weigh(a, b, weights)
    w = weights[:, None]
    return (a * w).to(a.dtype), (b * w).to(b.dtype), (a.float() * b.float()).sum(-1)


def spans(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of the experts that have any. Waits for the device: the loop is on the host."""
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return _gather(hidden, routing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _sum(grad, ctx.routing), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return _sum(rows, routing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _gather(grad, ctx.routing), None


class _RowWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, top_k_weights: Tensor, routing: Routing) -> Tensor:
        ctx.routing, ctx.dtype = routing, top_k_weights.dtype
        return top_k_weights.flatten()[routing.order].float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad[ctx.routing.inverse].view(-1, ctx.routing.top_k).to(ctx.dtype), None


def _gather(hidden: Tensor, routing: Routing) -> Tensor:
    if hidden.is_cuda:
        from qarl.kernels import routing_fused

        return routing_fused.spread(hidden, routing.order, routing.top_k)
    return hidden[routing.order // routing.top_k]


def _sum(rows: Tensor, routing: Routing) -> Tensor:
    if rows.is_cuda:  # torch would write the rows in the order of tokens first
        from qarl.kernels import routing_fused

        return routing_fused.collect(rows, routing.inverse, routing.top_k)
    by_token = rows[routing.inverse].unflatten(0, (-1, routing.top_k))
    return by_token.sum(1, dtype=torch.promote_types(rows.dtype, torch.float32)).to(rows.dtype)
