"""Packed attention for transformers, which calls it by name, with `sequence_lengths` handed through the model's keyword arguments.

transformers builds no mask for an attention it has no mask function for, which is what we want: a [T, T] mask would cost more
than the attention.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AttentionInterface

from qarl.kernels.attention import FLASH_DTYPES, attention, engine_attention, flash_attention

PACKED = "qarl_packed"
"""FlashAttention-2 for 16-bit values on CUDA, the definition elsewhere."""
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
    cu_seqlens: Tensor | None = None,
    sliding_window: int | None = None,
) -> tuple[Tensor, None]:
    """query [1, heads, T, D]; key, value [1, kv_heads, T, D]; `sequence_lengths` add up to T. Returns [1, T, heads, D].

    `cu_seqlens`: the lengths as kernels take them (`cumulative_lengths`), once for all layers.
    """
    if attention_mask is not None or query.shape[0] != 1 or sum(sequence_lengths) != query.shape[2]:
        raise ValueError("packed attention takes one row of whole sequences and no mask")
    if sliding_window is not None and sliding_window < max(sequence_lengths):
        raise ValueError(f"packed attention has no window: {sliding_window} tokens of {max(sequence_lengths)}")
    return compute(query[0], key[0], value[0], sequence_lengths, scaling, cu_seqlens).transpose(0, 1)[None], None


def positions(sequence_lengths: list[int], device: torch.device | str = "cpu") -> Tensor:
    """Positions within each sequence, from 0: int64 [1, T]."""
    return torch.cat([torch.arange(length) for length in sequence_lengths])[None].to(device)


def _by_device(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float | None, cu_seqlens: Tensor | None
) -> Tensor:
    if q.is_cuda and q.dtype in FLASH_DTYPES:
        return flash_attention(q, k, v, lengths, scale, cu_seqlens)
    return attention(q, k, v, lengths, scale)


def _register(name: str, compute: Callable[..., Tensor]) -> None:
    def forward(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        sequence_lengths: list[int],
        cu_seqlens: Tensor | None = None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **unused: object,
    ) -> tuple[Tensor, None]:
        return packed_attention(
            compute, query, key, value, attention_mask, sequence_lengths, scaling, cu_seqlens, sliding_window
        )

    AttentionInterface.register(name, forward)


_register(PACKED, _by_device)
_register(PACKED_ENGINE, engine_attention)
