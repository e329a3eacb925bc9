"""Causal attention over packed sequences: T tokens of whole sequences end to end, none of which sees another.

`attention` is the definition in plain torch. `flash_attention` is torch's FlashAttention-2 (CUDA, 16 bit). `engine_attention` is
the kernel that vLLM runs, forward; backward is FlashAttention-2's on CUDA and the definition's on CPU. Under a low-bit format the
last bit of attention matters: an activation that rounds to another int8 code moves every layer after it, and in a deep model a
float32 summation order is enough to make two exact INT8 pipelines as different as two formats.

On CUDA vLLM runs FlashAttention-3, which sums over keys in blocks counted from the first key, last block first. A row comes out
the same in the bits whether it is computed with its whole sequence (the learner; a prompt) or alone over the paged cache (decoding)
if the blocks are equally long and no row is split over several programs (num_splits = 1). They are in every case for heads of more
than 96, 128 keys for those of 128. For heads of up to 64 they are 128 keys but where a step has few queries (max_seqlen_q times
query heads of a KV head at most 64, as in decoding), there 192: equal bits up to 128 keys, not beyond. Our engine therefore tells
the kernel of a longer query than there is (rollout/patches.py), so that blocks are 128 keys in any step. Heads of 65 to 96 have
128 keys where the cache is paged and 144 where there is none (tile_size.h of vllm-project/flash-attention; the kernels that vLLM
0.26 is built with).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

BLOCK = 128
"""Tokens of a block of vLLM's KV cache on CPU, its default there."""
CPU_HEADS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
"""Widths of heads that vLLM's attention takes on CPU."""
FLASH_DTYPES = (torch.bfloat16, torch.float16)


def cumulative_lengths(lengths: list[int], device: torch.device | str = "cpu") -> Tensor:
    """int32 [S + 1]: where each of S sequences starts, and T: what FlashAttention calls cu_seqlens."""
    return pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(device)


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


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The same in one call (CUDA, bfloat16 or float16). `cu_seqlens`: `cumulative_lengths` on the device, where they are at hand:
    made here they are a copy from the host."""
    return _flash(_flash_forward, q, k, v, lengths, scale, cu_seqlens)


def engine_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float | None = None, cu_seqlens: Tensor | None = None
) -> Tensor:
    """The same, computed by the kernel that the engine runs on this device. Arguments as in `flash_attention`."""
    if q.is_cuda:
        return _flash(_engine_flash_forward, q, k, v, lengths, scale, cu_seqlens)
    return _EngineAttention.apply(q, k, v, lengths, q.shape[-1] ** -0.5 if scale is None else scale)


def _flash(
    compute: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    scale: float | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    starts = cumulative_lengths(lengths, q.device) if cu_seqlens is None else cu_seqlens
    longest = max(2, *lengths)  # 1 would be taken for decoding, a path without a backward
    rows = (x.transpose(0, 1) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _FlashAttention.apply(*rows, starts, longest, scale, compute).transpose(0, 1)


class _FlashAttention(torch.autograd.Function):
    """q [T, H, D]; k, v [T, H_kv, D] -> [T, H, D]. Either forward also gives log-sum-exp, float32 [H, T], all a backward needs."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float, compute: Any
    ) -> Tensor:
        y, logsumexp = compute(q, k, v, starts, longest, scale)
        ctx.save_for_backward(q, k, v, y, logsumexp, starts)
        ctx.longest, ctx.scale = longest, scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, logsumexp, starts = ctx.saved_tensors
        unused = torch.zeros(2, dtype=torch.uint64, device=q.device)  # random state, of a dropout of 0
        ends = (starts, starts, ctx.longest, ctx.longest)
        grads = torch.ops.aten._flash_attention_backward(
            grad, q, k, v, y, logsumexp, *ends, 0.0, True, unused, unused, scale=ctx.scale
        )
        return (*grads, None, None, None, None)


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, longest, longest, 0.0, True, False, scale=scale
    )[:2]


def _engine_flash_forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The call of vLLM's `FlashAttentionImpl`, with keys and values as they are for its paged cache."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q,
        k,
        v,
        max_seqlen_q=longest,
        cu_seqlens_q=starts,
        max_seqlen_k=longest,
        cu_seqlens_k=starts,
        softmax_scale=scale,
        causal=True,
        return_softmax_lse=True,
        num_splits=1,
        fa_version=3,
    )


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
    starts = cumulative_lengths(lengths)
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
