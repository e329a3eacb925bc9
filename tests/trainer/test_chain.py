"""What of a model follows the engine, and what is refused."""

from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from qarl.errors import ConfigError
from qarl.kernels.attention import cumulative_lengths
from qarl.kernels.dispatch import backends
from qarl.kernels.router import engine_top_experts
from qarl.trainer.attention import PACKED, PACKED_ENGINE, positions
from qarl.trainer.chain import Router, _Angles, _Norm, follow_engine, unknown

engine = pytest.mark.skipif(
    backends("w8a8_int8", "cpu", torch.float32)["engine"] is not None, reason="this machine's vLLM has no CPU ops"
)
LENGTHS = [6, 1, 150]
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "attn_implementation": PACKED,
}
EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}


def make(kind, **changes):
    torch.manual_seed(0)
    shape = {**SHAPE, **changes}
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape))
    shape = {"head_dim": 128, **shape}
    if kind == "qwen3_moe":
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **EXPERTS))
    return Qwen3ForCausalLM(Qwen3Config(**shape))


def logits(model, device="cpu"):
    tokens = torch.randint(64, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0)).to(device)
    where = {"position_ids": positions(LENGTHS, device), "cu_seqlens": cumulative_lengths(LENGTHS, device)}
    return model(tokens, sequence_lengths=LENGTHS, use_cache=False, **where).logits[0]


@engine
@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_that_follows_computes_what_it_did(kind, checkpointing):
    """On CPU in float32: but for the order of sums."""
    plain, followed = make(kind), make(kind)
    follow_engine(followed, "cpu")
    if checkpointing:
        followed.gradient_checkpointing_enable({"use_reentrant": False})
        followed.train()
    expected, ours = logits(plain), logits(followed)
    assert followed.config._attn_implementation == PACKED_ENGINE and not torch.equal(ours, expected)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    ours.square().sum().backward()
    for (name, a), b in zip(followed.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e-4 * b.grad.abs().max(), name


@pytest.mark.parametrize("kind, per_layer", [("llama", 0), ("qwen3", 2), ("qwen3_moe", 2)])
def test_on_cuda_every_norm_follows(kind, per_layer):
    model = make(kind)
    follow_engine(model, "cuda")
    norms = {path: module.forward for path, module in model.named_modules() if path.endswith("norm")}
    assert len(norms) == 2 * (2 + per_layer) + 1 and all(isinstance(forward, _Norm) for forward in norms.values())


def test_on_cuda_every_router_follows():
    model = make("qwen3_moe")
    follow_engine(model, "cuda")
    routers = [layer.mlp.gate.forward for layer in model.model.layers]
    assert all(isinstance(forward, Router) and forward.choose is engine_top_experts for forward in routers)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_table_gives_transformers_its_angles(kind):
    model = make(kind)
    x, where = torch.zeros(1, 157, 256), positions(LENGTHS)
    cos, sin = model.model.rotary_emb(x, where)
    ours = _Angles(model.config)(x, where)
    for mine, theirs in zip(ours, (cos, sin), strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=0, atol=150 * 2**-23)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ConfigError, match=r"learner.backend.*'mistral'.*choices"):
        follow_engine(MistralForCausalLM(MistralConfig(**SHAPE)), "cpu")


def test_heads_that_the_cache_would_sum_in_another_order_are_refused():
    with pytest.raises(ConfigError, match=r"learner.backend.*heads of 96"):
        follow_engine(make("qwen3", head_dim=96), "cuda")


def test_whether_a_model_can_follow_is_told_without_touching_it():
    model = make("qwen3", head_dim=96)
    assert unknown(make("qwen3_moe").config, "cuda") is None and unknown(model.config, "cpu") is None
    assert "heads of 96" in str(unknown(model.config, "cuda"))
    assert "not of 16" in str(unknown(make("qwen3", head_dim=16).config, "cpu"))
    assert not [path for path, module in model.named_modules() if "forward" in vars(module)]


def test_an_unknown_rotary_type_is_refused():
    model = make("qwen3", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(ConfigError, match=r"learner.backend.*'linear'.*llama3"):
        follow_engine(model, "cuda")


def test_an_attention_layer_whose_rotary_embedding_cannot_be_replaced_is_refused():
    model = make("qwen3")
    own: Any = type(model.model.layers[1].self_attn)

    class Wrapped(own):  # as a decorator would: the code that names the function is out of sight
        def forward(self, *arguments, **others):
            return super().forward(*arguments, **others)

    model.model.layers[1].self_attn.__class__ = Wrapped
    with pytest.raises(ConfigError, match=r"learner.backend.*1 of 2 attention layers.*apply_rotary_pos_emb"):
        follow_engine(model, "cpu")


def test_an_unknown_norm_is_refused():
    model = make("qwen3")
    model.model.layers[1].pre_feedforward_layernorm = type(model.model.norm)(256)
    with pytest.raises(ConfigError, match=r"learner.backend.*layers.1.pre_feedforward_layernorm"):
        follow_engine(model, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_cuda_a_model_that_follows_is_as_near_the_exact_one_as_the_plain_one(kind, checkpointing):
    """Logits and gradients in bfloat16, against the same weights in float32. (Experts chosen differently are no rounding error.)"""
    plain, followed = (make(kind).bfloat16().cuda() for _ in range(2))
    exact = make(kind).bfloat16().float().cuda()
    follow_engine(followed, "cuda")
    if checkpointing:
        followed.gradient_checkpointing_enable({"use_reentrant": False})
        followed.train()
    results = []
    for model in (exact, plain, followed):
        y = logits(model, "cuda").float()
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.float() for p in model.parameters())])
    for expected, a, b in zip(*results, strict=True):
        far = (a - expected).norm() / expected.norm()
        assert (b - expected).norm() / expected.norm() <= 3 * far + 2**-6
