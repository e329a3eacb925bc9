"""Which weights a format reaches, the contract over them, and the fused names both sides meet on."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from qarl import formats
from qarl.errors import ConfigError
from qarl.fusion import engine_name, fuse, fused_shapes
from qarl.shapes import parameter_shapes

SIZES: dict[str, Any] = dict(
    vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
)
SIZES |= dict(num_key_value_heads=2, head_dim=32)
MODELS = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES)),
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=128)),
}


def shapes_of(kind: str) -> dict[str, tuple[int, ...]]:
    model, config = MODELS[kind]
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in model(config).named_parameters()}


@pytest.mark.parametrize("kind", MODELS)
def test_shapes_from_a_config_equal_those_of_the_transformers_model(kind):
    assert parameter_shapes(MODELS[kind][1].to_dict()) == shapes_of(kind)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ConfigError, match="model.path: model type 'gpt2' is not one of"):
        parameter_shapes({"model_type": "gpt2"})


def test_the_router_is_kept_and_gate_proj_is_not():
    w4 = formats.get("w4a16")
    assert not w4.covers("model.layers.0.mlp.gate.weight", (128, 2048))
    assert w4.covers("model.layers.0.mlp.gate_proj.weight", (768, 2048))
    assert w4.covers("model.layers.0.mlp.experts.gate_up_proj", (128, 1536, 2048))
    assert not w4.covers("lm_head.weight", (300, 128)) and not w4.covers("model.embed_tokens.weight", (300, 128))
    assert not w4.covers("model.layers.0.self_attn.q_norm.weight", (32,))


@pytest.mark.parametrize("kind", MODELS)
def test_covered_are_exactly_the_linear_layers_and_experts_of_the_decoder(kind):
    covered = {n for n, s in shapes_of(kind).items() if formats.get("w8a8_int8").covers(n, s)}
    wanted = {n for n in shapes_of(kind) if "_proj" in n}
    assert covered == wanted
    assert not any(formats.get("bf16").covers(n, s) for n, s in shapes_of(kind).items())


def test_coverage_of_the_target_is_nearly_all_of_it():
    config = {"model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128}
    config |= {"moe_intermediate_size": 768}
    counted = formats.coverage(formats.get("w4a16"), parameter_shapes(config))
    assert 29.8e9 < counted.quantized < 29.95e9 and counted.linear > counted.quantized
    assert str(counted).startswith("29.9 of 30.2 B linear weights quantized, 4.12 bits")  # 4 + 16 / 128


def test_bits_count_the_scales():
    assert formats.get("w4a16").bits_per_weight((512, 1024)) == 4 + 16 / 128
    assert formats.get("w4a16_g32").bits_per_weight((512, 1024)) == 4 + 16 / 32
    assert formats.get("w8a8_int8").bits_per_weight((512, 1024)) == 8 + 32 / 1024


def test_a_group_that_does_not_divide_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"'w4a16' needs input features divisible by 128, but a.q_proj.weight"):
        formats.get("w4a16").check_shape("a.q_proj.weight", (128, 96))
    formats.get("w4a16_g32").check_shape("a.q_proj.weight", (128, 96))


def test_an_unknown_format_names_the_nearest():
    with pytest.raises(ConfigError, match="rollout.format: 'w4a61' is not one of .* did you mean 'w4a16'"):
        formats.get("w4a61")


TENSORS = {"model.layers.0.self_attn.qkv_proj": (256, 128), "model.layers.0.mlp.down_proj": (128, 256)}


def test_the_contract_hash_changes_with_everything_in_it_and_with_nothing_else():
    base = formats.get("w4a16")
    changed = [
        formats.get("w4a16_g32").contract_hash(TENSORS),
        replace(base, scale_rule="absmax/7").contract_hash(TENSORS),
        replace(base, scale_dtype="float32").contract_hash(TENSORS),
        replace(base, source_dtype="float32").contract_hash(TENSORS),
        replace(base, keep=(*base.keep, "o_proj")).contract_hash(TENSORS),
        base.contract_hash({**TENSORS, "model.layers.0.mlp.gate": (8, 128)}),
        base.contract_hash({**TENSORS, "model.layers.0.mlp.down_proj": (128, 512)}),
    ]
    own = base.contract_hash(TENSORS)
    assert len({own, *changed}) == 1 + len(changed)
    assert own == base.contract_hash(dict(reversed(TENSORS.items())))
    assert own == replace(base, keep=tuple(reversed(base.keep))).contract_hash(TENSORS)


def test_fused_names_and_shapes():
    assert engine_name("model.layers.3.self_attn.k_proj.weight") == ("model.layers.3.self_attn.qkv_proj", 1)
    assert engine_name("model.layers.3.self_attn.v_proj.bias") == ("model.layers.3.self_attn.qkv_proj.bias", 2)
    assert engine_name("model.layers.3.mlp.experts.down_proj") == ("model.layers.3.mlp.experts.w2", 0)
    assert engine_name("lm_head.weight") == ("lm_head", 0)
    shapes = fused_shapes(shapes_of("qwen3_moe"))
    assert shapes["model.layers.1.self_attn.qkv_proj"] == (128 + 64 + 64, 128)
    assert shapes["model.layers.1.mlp.experts.w13"] == (4, 256, 128)
    assert sum(map(math.prod, shapes.values())) == sum(map(math.prod, shapes_of("qwen3_moe").values()))


@given(st.permutations(["q_proj", "k_proj", "v_proj"]))
def test_fusing_orders_parts_whatever_order_they_come_in(order):
    names = [f"m.{leaf}.weight" for leaf in order]
    assert fuse(names) == {"m.qkv_proj": ["m.q_proj.weight", "m.k_proj.weight", "m.v_proj.weight"]}
