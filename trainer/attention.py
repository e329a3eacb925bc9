"""Packed attention for transformers, which calls it by name, with `sequence_lengths` handed through the model's keyword arguments.

transformers builds no mask for an attention it has no mask function for, which is what we want: a [T, T] mask would cost more
than the attention.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AttentionInterface

from qarl.kernels.attention import attention, engine_attention

PACKED = "qarl_packed"
"""The definition, in plain torch."""
PACKED_ENGINE = "qarl_packed_engine"
"""The engine's own kernel."""


def packed_attention(
    compute: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sequence_lengths: list[int],
    scaling: float | None,
) -> tuple[Tensor, None]:
    """query [1, heads, T, D]; key, value [1, kv_heads, T, D]; `sequence_lengths` add up to T. Returns [1, T, heads, D]."""
    if attention_mask is not None or query.shape[0] != 1 or sum(sequence_lengths) != query.shape[2]:
        raise ValueError("packed attention takes one row of whole sequences and no mask")
    return compute(query[0], key[0], value[0], sequence_lengths, scaling).transpose(0, 1)[None], None


def positions(sequence_lengths: list[int], device: torch.device | str = "cpu") -> Tensor:
    """Positions within each sequence, from 0: int64 [1, T]."""
    return torch.cat([torch.arange(length, device=device) for length in sequence_lengths])[None]


def _register(name: str, compute: Callable[..., Tensor]) -> None:
    def forward(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        sequence_lengths: list[int],
        scaling: float | None = None,
        **unused: object,
    ) -> tuple[Tensor, None]:
        return packed_attention(compute, query, key, value, attention_mask, sequence_lengths, scaling)

    AttentionInterface.register(name, forward)


_register(PACKED, attention)
_register(PACKED_ENGINE, engine_attention)
