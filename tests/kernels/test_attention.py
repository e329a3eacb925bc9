"""Packed attention: the definition against float64, kernels against the definition, both ways."""

from collections.abc import Callable

import pytest
import torch

from qarl.kernels.attention import BLOCK, attention, cumulative_lengths, engine_attention, flash_attention
from qarl.kernels.dispatch import backends

engine = pytest.mark.skipif(
    backends("w8a8_int8", "cpu", torch.float32)["engine"] is not None, reason="this machine's vLLM has no CPU ops"
)
#: Lengths of packed sequences: one token, a block and its neighbours, several blocks, many short ones.
LENGTHS = ([1], [5, 1, 9], [BLOCK], [BLOCK - 1, BLOCK + 1], [300, 2, 129], [3] * 40)
#: float32 sums of at most 300 terms of size 1 in another order: a few units in the last place of values up to about 4.
RTOL, ATOL = 1e-5, 4e-6


def qkv(lengths, dtype=torch.float32, heads=4, kv_heads=2, width=32):
    generator = torch.Generator().manual_seed(sum(lengths))
    shapes = ((heads, sum(lengths), width), (kv_heads, sum(lengths), width), (kv_heads, sum(lengths), width))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def by_hand(q, k, v, lengths, scale):
    """One token at a time, in float64."""
    out, start = [], 0
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    for length in lengths:
        for t in range(start, start + length):
            past = slice(start, t + 1)
            weights = torch.softmax((q[:, t, None] @ k[:, past].mT) * scale, -1)
            out.append(weights @ v[:, past])
        start += length
    return torch.cat(out, 1)


@pytest.mark.parametrize("lengths", [[1], [5, 1, 9], [40]], ids=str)
def test_definition_is_softmax_of_each_sequence_by_itself(lengths):
    q, k, v = qkv(lengths, torch.float64)
    torch.testing.assert_close(attention(q, k, v, lengths, 0.3), by_hand(q, k, v, lengths, 0.3), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(attention(q, k, v, lengths), by_hand(q, k, v, lengths, 32**-0.5), rtol=1e-12, atol=1e-12)


@engine
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_engine_computes_the_definition_forward_and_backward(lengths):
    q, k, v = inputs = qkv(lengths)
    grads = []
    for compute in (attention, engine_attention):
        y = compute(q, k, v, lengths)
        grads.append((y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y).cumsum(1) / len(y[0]))))
    for mine, definition in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(mine, definition, rtol=RTOL, atol=ATOL)


@engine
def test_engine_gives_a_sequence_the_same_bits_whatever_it_is_packed_with():
    """What makes a learner's packing and an engine's batching agree to the last bit."""
    lengths = [50, 7, 200]
    q, k, v = qkv(lengths)
    packed, start = engine_attention(q, k, v, lengths), 0
    for length in lengths:
        part = slice(start, start + length)
        alone = engine_attention(q[:, part], k[:, part], v[:, part], [length])
        assert torch.equal(packed[:, part], alone)
        start += length


def test_cumulative_lengths_start_at_zero_and_end_at_the_total():
    starts = cumulative_lengths([3, 1, 2])
    assert starts.dtype == torch.int32 and starts.tolist() == [0, 3, 4, 6]


@engine
def test_nan_stays_in_its_own_sequence():
    q, k, v = (x.detach() for x in qkv([4, 6]))
    k[:, 1] = float("nan")
    y = engine_attention(q, k, v, [4, 6])
    assert y[:, 1:4].isnan().any() and y[:, 4:].isfinite().all()


FLASH: dict[str, Callable[..., torch.Tensor]] = {"flash": flash_attention, "engine": engine_attention}


@pytest.mark.gpu
@pytest.mark.parametrize("name", FLASH)
@pytest.mark.parametrize("heads, kv_heads, width", [(16, 8, 128), (9, 3, 64), (4, 4, 64)])
@pytest.mark.parametrize(
    "lengths", [[1], [1] * 50, [5, 1, 9], [127, 1, 129, 300], [3] * 400, [2050]], ids=lambda x: str(x[:4])
)
def test_flash_computes_the_definition_forward_and_backward(name, heads, kv_heads, width, lengths):
    """bfloat16 keeps 8 bits: an output is rounded once, and before it each weight of its sum."""
    inputs = [x.detach().cuda().requires_grad_() for x in qkv(lengths, torch.bfloat16, heads, kv_heads, width)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    y, expected = FLASH[name](*inputs, lengths), attention(exact[0], exact[1], exact[2], lengths)
    assert y.dtype == torch.bfloat16 and y.shape == inputs[0].shape
    assert (y - expected).abs().max() <= 2**-8 * (expected.abs().max() + inputs[2].abs().max())
    weights = torch.randn_like(expected).bfloat16()
    ours = torch.autograd.grad(y, inputs, weights)
    # Five roundings of relative size 2^-9 each lie on the way to a gradient, of a size that sums of them keep.
    for mine, theirs in zip(ours, torch.autograd.grad(expected, exact, weights.double()), strict=True):
        assert (mine - theirs).norm() <= 0.01 * theirs.norm() + 1e-4 * theirs.numel() ** 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("name", FLASH)
def test_flash_does_not_wait_for_the_device(name):
    """Neither the forward nor the backward of a layer, given what a forward of the model makes once."""
    lengths = [5, 200, 1]
    inputs = [x.detach().cuda().requires_grad_() for x in qkv(lengths, torch.bfloat16, 4, 2, 128)]
    starts = cumulative_lengths(lengths, "cuda")
    FLASH[name](*inputs, lengths, cu_seqlens=starts).sum().backward()  # what is loaded or allocated once
    torch.cuda.set_sync_debug_mode("error")
    try:
        FLASH[name](*inputs, lengths, cu_seqlens=starts).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def paged(k, v, page=16):
    """Keys and values [H_kv, T, D] as vLLM has them: pages of [page, H_kv, 2 D], the last one filled up with rubbish."""
    rows = torch.cat([k, v], -1).transpose(0, 1)
    pages = -(-len(rows) // page)
    cache = torch.full((pages, page, len(k), 2 * k.shape[-1]), 7.0, dtype=k.dtype, device=k.device)
    cache.view(pages * page, len(k), -1)[: len(rows)] = rows
    return cache.split(k.shape[-1], dim=-1), torch.arange(pages, dtype=torch.int32, device=k.device)


def decoded(q, k, v, n_tokens, declared, scheduled):
    """The rows of one sequence over its paged cache, `n_tokens` of them in each of as many requests as there are rows for.

    `declared`: the most that vLLM says a request has.
    """
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    (keys, values), pages = paged(k, v)
    heads, total, width = q.shape
    ends = torch.arange(n_tokens, total + 1, n_tokens, dtype=torch.int32, device="cuda")
    starts = torch.arange(len(ends) + 1, dtype=torch.int32, device="cuda") * n_tokens
    rows = q.transpose(0, 1)[: len(ends) * n_tokens].contiguous()
    metadata = None
    if scheduled:  # as where vLLM plans a step ahead
        metadata = get_scheduler_metadata(
            len(ends),
            declared,
            total,
            heads,
            len(k),
            width,
            ends,
            cu_seqlens_q=starts,
            page_size=16,
            causal=True,
            num_splits=1,
        )
    y = flash_attn_varlen_func(
        rows,
        keys,
        values,
        max_seqlen_q=declared,
        cu_seqlens_q=starts,
        max_seqlen_k=total,
        seqused_k=ends,
        softmax_scale=width**-0.5,
        causal=True,
        block_table=pages.expand(len(ends), -1).contiguous(),
        scheduler_metadata=metadata,
        num_splits=1,
        fa_version=3,
    )
    return y.transpose(0, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("n_tokens", [1, 50])
@pytest.mark.parametrize(
    "heads, kv_heads, width, declared, equal_up_to",
    [(16, 8, 128, 1, 900), (32, 4, 128, 1, 900), (9, 3, 64, 1, 128), (9, 3, 64, 65, 900), (4, 4, 32, 65, 900)],
)
def test_engine_gives_a_row_the_same_bits_in_decoding(
    heads, kv_heads, width, declared, equal_up_to, n_tokens, scheduled
):
    """What lets a learner follow tokens that were sampled one at a time, and prompts that were computed in pieces."""
    q, k, v = (x.detach().cuda() for x in qkv([900], torch.bfloat16, heads, kv_heads, width))
    whole = engine_attention(q, k, v, [900])
    rows = decoded(q, k, v, n_tokens, max(declared, n_tokens), scheduled)[:, :equal_up_to]
    different = (rows != whole[:, :equal_up_to]).any(-1).any(0).nonzero().flatten()
    assert not len(different), f"{len(different)} rows, the first {different[:5].tolist()}"


@pytest.mark.gpu
def test_engine_on_cuda_gives_a_sequence_the_same_bits_whatever_it_is_packed_with():
    lengths = [50, 7, 900]
    q, k, v = (x.detach().cuda() for x in qkv(lengths, torch.bfloat16, 16, 8, 128))
    packed, start = engine_attention(q, k, v, lengths), 0
    for length in lengths:
        part = slice(start, start + length)
        assert torch.equal(packed[:, part], engine_attention(q[:, part], k[:, part], v[:, part], [length]))
        start += length
