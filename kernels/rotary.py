"""Rotary position embedding in the two-halves layout: `rotary` is the definition, `engine_rotary` vLLM's own op.

The two differ in the last bit, in float32 in one value of eight: the op fuses a multiplication with the addition, and in bfloat16
it rounds once where the definition rounds three times. See `attention` for why that matters under a low-bit format.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [H, T, D], cos and sin [T, D] (both halves equal): x cos + rotate_half(x) sin, with rotate_half([a, b]) = [-b, a]."""
    return x * cos + _rotate_half(x) * sin


ROPE_TYPES = ("default", "llama3")


def rotary_table(
    width: int, n_positions: int, parameters: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[n_positions, width]: cos of every angle, then sin, by vLLM's arithmetic: all of it in float32 on `device`, then rounded.

    transformers makes the frequencies on CPU, where a power may differ in its last bit; times a position of some thousands that
    is another bfloat16. `parameters`: `rope_parameters` of a transformers configuration, of a type in `ROPE_TYPES`.
    """
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    frequencies = 1.0 / (parameters["rope_theta"] ** exponents)
    if parameters.get("rope_type", "default") == "llama3":
        frequencies = _llama3(frequencies, parameters)
    positions = torch.arange(n_positions, dtype=torch.float32, device=device)
    angles = torch.einsum("i,j->ij", positions, frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


def _llama3(frequencies: Tensor, parameters: dict[str, Any]) -> Tensor:
    """Llama 3.1's stretch: long waves `factor` times slower, short ones as they are, between them a mixture of both."""
    factor, context = parameters["factor"], parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    wave = 2 * math.pi / frequencies
    share = (context / wave - low) / (high - low)
    mixed = (1 - share) * frequencies / factor + share * frequencies
    slowed = torch.where(wave > context / low, frequencies / factor, mixed)
    return torch.where(wave < context / high, frequencies, slowed)


def engine_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Both, as the engine computes them on this device: q [1, H, T, D], k [1, H_kv, T, D], cos and sin [1, T, D]; the signature of
    the function of this purpose in transformers."""
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
    """The call of vLLM's `RotaryEmbedding`, over a table of these tokens in place of one of all positions."""
    from vllm import _custom_ops as ops

    n_tokens, width = q.shape[2], q.shape[3]
    table = torch.cat([cos[0, :, : width // 2], sin[0, :, : width // 2]], dim=-1)
    turned_q, turned_k = (x[0].transpose(0, 1).reshape(n_tokens, -1).clone() for x in (q, k))  # written in place
    ops.rotary_embedding(torch.arange(n_tokens, device=q.device), turned_q, turned_k, width, table, True)
    return _heads(turned_q, width), _heads(turned_k, width)


def _heads(rows: Tensor, width: int) -> Tensor:
    """[T, H D] -> [1, H, T, D]."""
    return rows.view(len(rows), -1, width).transpose(0, 1)[None]


def _rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)
