"""What is published: fused, quantized once, complete."""

import numpy as np
import pytest
import torch

from qarl.errors import ConfigError
from qarl.formats import get
from qarl.kernels.checksum import checksum
from qarl.kernels.dispatch import load
from qarl.trainer.publish import make_update
from qarl.wire import from_wire

BLOCK = "model.layers.0"
SHAPES = {
    "model.embed_tokens.weight": (50, 64),
    f"{BLOCK}.self_attn.q_proj.weight": (32, 64),
    f"{BLOCK}.self_attn.q_proj.bias": (32,),
    f"{BLOCK}.self_attn.k_proj.weight": (16, 64),
    f"{BLOCK}.self_attn.k_proj.bias": (16,),
    f"{BLOCK}.self_attn.v_proj.weight": (16, 64),
    f"{BLOCK}.self_attn.v_proj.bias": (16,),
    f"{BLOCK}.self_attn.o_proj.weight": (64, 32),
    f"{BLOCK}.mlp.gate.weight": (4, 64),
    f"{BLOCK}.mlp.experts.gate_up_proj": (4, 48, 64),
    f"{BLOCK}.mlp.experts.down_proj": (4, 64, 32),
    f"{BLOCK}.input_layernorm.weight": (64,),
}
QKV = f"{BLOCK}.self_attn.qkv_proj"


def parameters():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def streamed(weights):
    """As under ZeRO-3: a tensor is gone once the next is asked for."""
    for name, weight in weights.items():
        copy = weight.clone()
        yield name, copy
        copy.fill_(float("nan"))


def updated(weights, format, version, n_tiles=0):
    return make_update(streamed(weights), SHAPES, format, version, torch.device("cpu"), torch.float32, n_tiles)


@pytest.mark.parametrize("name", ["w8a8_int8", "w8a8_fp8", "w4a16_g32"])
def test_codes_of_fused_tensors_are_codes_of_the_stacked_weights(name):
    weights, format = parameters(), get(name)
    update = updated(weights, format, version=3)
    stacked = torch.cat([weights[f"{BLOCK}.self_attn.{p}_proj.weight"] for p in "qkv"])
    expected = {QKV: stacked, f"{BLOCK}.mlp.experts.w13": weights[f"{BLOCK}.mlp.experts.gate_up_proj"]}
    for fused, weight in expected.items():
        codes = load(name, "emulated").quantize(weight, format.group)
        published = update.tensors[fused]
        assert published.keys() == codes.keys()
        for part, values in codes.items():
            assert torch.equal(from_wire(published[part]).view(torch.uint8), values.view(torch.uint8)), (fused, part)
            assert update.checksums[fused][part] == checksum(values)
    assert (update.version, update.format) == (3, name)


def test_everything_else_is_published_as_it_is():
    weights = parameters()
    update = updated(weights, get("w8a8_int8"), version=0)
    for kept in ("model.embed_tokens", f"{BLOCK}.mlp.gate", f"{BLOCK}.input_layernorm"):
        assert torch.equal(from_wire(update.tensors[kept]["weight"]), weights[f"{kept}.weight"])
    biases = torch.cat([weights[f"{BLOCK}.self_attn.{p}_proj.bias"] for p in "qkv"])
    assert torch.equal(from_wire(update.tensors[f"{QKV}.bias"]["bias"]), biases)
    assert len(update.tensors) == 8


def test_bf16_publishes_fused_weights():
    weights = parameters()
    update = updated(weights, get("bf16"), version=0, n_tiles=2)
    stacked = torch.cat([weights[f"{BLOCK}.self_attn.{p}_proj.weight"] for p in "qkv"])
    assert torch.equal(from_wire(update.tensors[QKV]["weight"]), stacked)
    assert update.tiles == ()


def test_tiles_are_dequantized_columns_of_other_tensors_each_version():
    weights, format = parameters(), get("w4a16_g32")
    updates = [updated(weights, format, version, n_tiles=2) for version in range(4)]
    for update in updates:
        assert len(update.tiles) == 2
        for tile in update.tiles:
            codes = {part: from_wire(wire) for part, wire in update.tensors[tile.tensor].items()}
            whole = load(format.name, "emulated").dequantize(codes, format.group, torch.float32)
            assert len(tile.columns) == 1
            assert np.array_equal(tile.values, whole[..., torch.from_numpy(tile.columns)].numpy())
    assert {t.tensor for u in updates for t in u.tiles} == {QKV, f"{BLOCK}.self_attn.o_proj"} | {
        f"{BLOCK}.mlp.experts.{w}" for w in ("w13", "w2")
    }
    assert updates[0].tiles[0].columns.tolist() != updates[2].tiles[0].columns.tolist()


def test_contract_is_that_of_the_fused_tensors():
    format = get("w8a8_int8")
    fused: dict[str, tuple[int, ...]] = {QKV: (64, 64), f"{BLOCK}.self_attn.o_proj": (64, 32)}
    fused |= {f"{BLOCK}.mlp.experts.w13": (4, 48, 64), f"{BLOCK}.mlp.experts.w2": (4, 64, 32)}
    assert updated(parameters(), format, 0).contract_hash == format.contract_hash(fused)


def test_a_missing_part_is_an_error():
    weights = parameters()
    del weights[f"{BLOCK}.self_attn.k_proj.weight"]
    with pytest.raises(ValueError, match="qkv_proj"):
        updated(weights, get("w8a8_int8"), 0)


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="divisible by 128"):
        updated(parameters(), get("w4a16"), 0)


def test_stages_are_timed():
    assert set(updated(parameters(), get("w8a8_int8"), 0).seconds) == {"gather", "quantize", "pack"}
