"""Rotary position embedding in the two-halves layout: `emulated` is the definition, `engine` vLLM's own CPU op.

The two differ in the last bit of one value in eight: the op fuses a multiplication with the addition. See `attention` for why that
matters under a low-bit format.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [H, T, D], cos and sin [T, D] (both halves equal): x cos + rotate_half(x) sin, with rotate_half([a, b]) = [-b, a]."""
    return x * cos + _rotate_half(x) * sin


def engine_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Both, as the engine computes them (CPU): q [1, H, T, D], k [1, H_kv, T, D], cos and sin [1, T, D]; the signature of the
    function of this purpose in transformers."""
    return _EngineRotary.apply(q, k, cos, sin)


class _EngineRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _engine_turn(q, k, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors  # a rotation: its transpose turns back
        return *(g * cos - _rotate_half(g * sin) for g in (grad_q, grad_k)), None, None


def _engine_turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The call of vLLM's `RotaryEmbedding` on CPU."""
    from vllm import _custom_ops as ops

    n_tokens, width = q.shape[2], q.shape[3]
    table = torch.cat([cos[0, :, : width // 2], sin[0, :, : width // 2]], dim=-1)
    turned_q, turned_k = (x[0].transpose(0, 1).reshape(n_tokens, -1).clone() for x in (q, k))  # written in place
    ops.rotary_embedding(torch.arange(n_tokens), turned_q, turned_k, width, table, True)
    return _heads(turned_q, width), _heads(turned_k, width)


def _heads(rows: Tensor, width: int) -> Tensor:
    """[T, H D] -> [1, H, T, D]."""
    return rows.view(len(rows), -1, width).transpose(0, 1)[None]


def _rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)
