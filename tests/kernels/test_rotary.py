"""Rotary embedding: the definition against complex numbers, vLLM's op against the definition, tables against both libraries."""

import os
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from qarl.kernels.dispatch import backends
from qarl.kernels.rotary import engine_rotary, rotary, rotary_table

engine = pytest.mark.skipif(
    backends("w8a8_int8", "cpu", torch.float32)["engine"] is not None, reason="this machine's vLLM has no CPU ops"
)
#: A plain one, and Llama 3.1's.
PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
}


def heads_of(n_tokens, heads, width, dtype=torch.float32):
    return torch.randn(heads, n_tokens, width, generator=torch.Generator().manual_seed(n_tokens)).to(dtype)


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
    q, k = (heads_of(n_tokens, heads, 32).requires_grad_() for heads in (4, 2))
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


@pytest.mark.parametrize("kind", PARAMETERS)
def test_table_is_that_of_transformers(kind):
    """In float32 on one device, but for a last bit of a frequency times a position of up to 2048."""
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=2048, rope_parameters=PARAMETERS[kind]
    )
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(2048)[None])
    table = rotary_table(64, 2048, PARAMETERS[kind], torch.float32, torch.device("cpu"))
    theirs = torch.cat([cos[0, :, :32], sin[0, :, :32]], -1)
    torch.testing.assert_close(table, theirs, rtol=0, atol=2048 * 2**-23)


def engine_table(width, n_positions, parameters, device):
    """The buffer of vLLM's layer."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    with patch.dict(os.environ), set_current_vllm_config(VllmConfig()), torch.device(device):
        return get_rope(width, n_positions, rope_parameters=parameters, dtype=torch.bfloat16).cos_sin_cache


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("kind", PARAMETERS)
def test_table_equals_the_engines(kind, width):
    ours = rotary_table(width, 40960, PARAMETERS[kind], torch.bfloat16, torch.device("cuda"))
    assert torch.equal(ours, engine_table(width, 40960, PARAMETERS[kind], "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("heads, kv_heads, width", [(16, 8, 128), (9, 3, 64)])
def test_engine_rotary_equals_the_op_over_its_own_table(heads, kv_heads, width):
    """Tokens of several sequences, at positions of theirs; forward bit for bit, backward against the definition."""
    from vllm import _custom_ops as ops

    table = rotary_table(width, 4096, PARAMETERS["default"], torch.bfloat16, torch.device("cuda"))
    where = torch.cat([torch.arange(300), torch.arange(4000, 4096), torch.tensor([0])]).cuda()
    q, k = (heads_of(len(where), n, width, torch.bfloat16).cuda().requires_grad_() for n in (heads, kv_heads))
    cos, sin = (torch.cat([half, half], -1)[None] for half in table[where].chunk(2, -1))
    ours = engine_rotary(q[None], k[None], cos, sin)
    theirs = [x.detach().transpose(0, 1).reshape(len(where), -1).clone() for x in (q, k)]
    ops.rotary_embedding(where, theirs[0], theirs[1], width, table, True)
    for x, y, expected in zip((q, k), ours, theirs, strict=True):
        assert torch.equal(y[0].transpose(0, 1).reshape(len(where), -1), expected)
        weights = torch.randn_like(y[0])
        mine = torch.autograd.grad(y[0], x, weights, retain_graph=True)[0]
        exact = x.detach().double().requires_grad_()
        definition = torch.autograd.grad(rotary(exact, cos[0].double(), sin[0].double()), exact, weights.double())[0]
        assert (mine - definition).abs().max() <= 3 * 2**-8 * weights.abs().max()  # three roundings
