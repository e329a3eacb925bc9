"""Packed attention and rotary embedding: the definitions against float64, vLLM's ops against the definitions, both ways."""

import pytest
import torch

from qarl.kernels.attention import BLOCK, attention, engine_attention
from qarl.kernels.dispatch import backends
from qarl.kernels.rotary import engine_rotary, rotary

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


@engine
def test_nan_stays_in_its_own_sequence():
    q, k, v = (x.detach() for x in qkv([4, 6]))
    k[:, 1] = float("nan")
    y = engine_attention(q, k, v, [4, 6])
    assert y[:, 1:4].isnan().any() and y[:, 4:].isfinite().all()


def angles(n_tokens, width):
    table = torch.arange(n_tokens)[:, None] * 100.0 ** -(torch.arange(0, width, 2) / width)
    table = torch.cat([table, table], -1)
    return table.cos(), table.sin()


def test_rotary_turns_each_pair_by_its_angle():
    x, (cos, sin) = torch.randn(3, 5, 8, dtype=torch.float64), angles(5, 8)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos, sin)[:, :4].to(torch.complex128)
    torch.testing.assert_close(rotary(x, cos, sin), torch.cat([turned.real, turned.imag], -1), rtol=1e-6, atol=1e-6)


@engine
@pytest.mark.parametrize("n_tokens", [1, 37])
def test_engine_rotary_computes_the_definition_forward_and_backward(n_tokens):
    q, k, _ = qkv([n_tokens])
    cos, sin = angles(n_tokens, 32)
    before = q.detach().clone()
    mine = engine_rotary(q[None], k[None], cos[None], sin[None])
    assert torch.equal(q.detach(), before)  # the op writes in place, into a copy
    for x, y in ((q, mine[0][0]), (k, mine[1][0])):
        expected = rotary(x, cos, sin)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)  # one rounding less, by a fused multiply-add
        weights = torch.randn_like(y)
        ours = torch.autograd.grad(y, x, weights, retain_graph=True)[0]
        torch.testing.assert_close(ours, torch.autograd.grad(expected, x, weights)[0], rtol=1e-6, atol=1e-6)
