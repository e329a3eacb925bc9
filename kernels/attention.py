"""Causal attention over packed sequences: T tokens of whole sequences end to end, none of which sees another.

`emulated` is the definition in plain torch. `engine` is vLLM's own CPU kernel, forward; backward is the definition's. Under a
low-bit format the last bit of attention matters: an activation that rounds to another int8 code moves every layer after it, and
in a deep model a float32 summation order is enough to make two exact INT8 pipelines as different as two formats.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

BLOCK = 128
"""Tokens of a block of vLLM's KV cache on CPU, its default there."""


def attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float | None = None) -> Tensor:
    """q [H, T, D]; k, v [H_kv, T, D]; `lengths` add up to T. Returns [H, T, D]: softmax(q kᵀ scale) v within each sequence.

    `scale`: 1/√D where none is given. One product per sequence: padding them to one batch does needless work on uneven ones.
    """
    outputs = [
        scaled_dot_product_attention(
            a[None], b[None], c[None], is_causal=True, scale=scale, enable_gqa=len(a) != len(b)
        )
        for a, b, c in zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True)
    ]
    return torch.cat(outputs, dim=2)[0]


def engine_attention(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float | None = None) -> Tensor:
    """The same, computed by the kernel that the engine runs (CPU). Shapes as in `attention`."""
    return _EngineAttention.apply(q, k, v, lengths, scale or q.shape[-1] ** -0.5)


class _EngineAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.lengths, ctx.scale = lengths, scale
        return _engine_prefill(q, k, v, lengths, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            q, k, v = (x.detach().requires_grad_() for x in ctx.saved_tensors)
            y = attention(q, k, v, ctx.lengths, ctx.scale)
        return (*torch.autograd.grad(y, (q, k, v), grad), None, None)


def _engine_prefill(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
    """The calls of vLLM's `CPUAttentionBackendImpl` for a prefill of all sequences, on a cache of its own."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    heads, kv_heads, width = len(q), len(k), q.shape[-1]
    isa = _get_attn_isa(q.dtype, BLOCK, width)
    n_tokens = torch.tensor(lengths, dtype=torch.int32)
    starts = torch.nn.functional.pad(n_tokens.cumsum(0, dtype=torch.int32), (1, 0))
    blocks = (n_tokens + BLOCK - 1) // BLOCK
    first = blocks.cumsum(0, dtype=torch.int32) - blocks
    # A table may name blocks beyond a sequence's own: they are not read.
    table = first[:, None] + torch.arange(int(blocks.max()), dtype=torch.int32)
    slots = torch.cat([int(f) * BLOCK + torch.arange(n) for f, n in zip(first, lengths, strict=True)])
    cache = torch.zeros(int(blocks.sum()), kv_heads, 2 * BLOCK, width, dtype=q.dtype)
    keys, values = cache.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(
        k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous(), keys, values, slots, isa
    )
    schedule = ops.cpu_attn_get_scheduler_metadata(
        len(lengths), heads, kv_heads, width, n_tokens, q.dtype, starts, True, -1, isa, True
    )
    query = q.transpose(0, 1).contiguous()
    y = torch.empty_like(query)
    ops.cpu_attention_with_kv_cache(
        query, keys, values, y, starts, n_tokens, scale, True, None, -1, table, 0.0, schedule, None
    )
    return y.transpose(0, 1)
