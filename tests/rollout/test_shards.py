"""What a rank takes of a published tensor is what vLLM's own loaders give it, for any rank of any number; and a share is proved."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter as vllm_parameter
from vllm.model_executor.layers import linear, vocab_parallel_embedding
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.model_loader.reload.layerwise import record_metadata_for_reloading

from qarl import formats
from qarl.errors import SyncError
from qarl.kernels.checksum import checksum
from qarl.kernels.dispatch import quantizer
from qarl.records import Tile
from qarl.rollout.shards import Cut, Share
from qarl.rollout.slots import contract_hash, find_slots
from qarl.rollout.vllm_settings import quantization_override
from qarl.transfer import HostDelivery
from qarl.wire import Spec, to_wire

HIDDEN, HEAD, MIDDLE, VOCABULARY = 256, 32, 512, 103
FORMATS = ["bf16", "w8a8_int8", "w8a8_fp8", "w4a16_g32"]
HEADS = [(2, 8, 4), (2, 8, 1), (4, 8, 2), (4, 4, 1), (1, 4, 2)]
"""Ranks, heads, key and value heads."""


def _parts(format: str, weight: Tensor) -> dict[str, Tensor]:
    """As published; bf16 here is float32."""
    found = formats.get(format)
    return quantizer(format, "cpu").quantize(weight, found.group) if found.quantizes else {"weight": weight}


def _layers(format: str, ranks: int, rank: int, heads: int, kv_heads: int) -> Any:
    """vLLM's layers of one rank, as they are before they are loaded."""
    override = quantization_override(formats.get(format))
    config = CompressedTensorsConfig.from_config(override["quantization_config"]) if override else None
    dtype = torch.bfloat16 if formats.get(format).weight == "int4" else torch.float32
    told = [patch.object(m, "get_tensor_model_parallel_rank", lambda: rank) for m in _ASK]
    told += [patch.object(m, "get_tensor_model_parallel_world_size", lambda: ranks) for m in _ASK]
    model: Any = nn.Module()
    vllm_config: Any = VllmConfig()
    vllm_config.model_config = SimpleNamespace(dtype=dtype)
    with _all(told), set_current_vllm_config(vllm_config):
        named: Any = {"bias": False, "params_dtype": dtype, "quant_config": config}
        model.qkv_proj = linear.QKVParallelLinear(HIDDEN, HEAD, heads, kv_heads, prefix="qkv_proj", **named)
        model.o_proj = linear.RowParallelLinear(heads * HEAD, HIDDEN, prefix="o_proj", **named)
        model.gate_up_proj = linear.MergedColumnParallelLinear(HIDDEN, [MIDDLE] * 2, prefix="gate_up_proj", **named)
        model.embed = vocab_parallel_embedding.VocabParallelEmbedding(VOCABULARY, HIDDEN, params_dtype=dtype)
        model.norm = nn.LayerNorm(HIDDEN, bias=False, dtype=dtype)
    record_metadata_for_reloading(model)
    return model


_ASK = (linear, vllm_parameter, vocab_parallel_embedding)


@contextmanager
def _all(managers: list[Any]) -> Iterator[None]:
    for manager in managers:
        manager.start()
    try:
        yield
    finally:
        for manager in managers:
            manager.stop()


@pytest.mark.parametrize(("ranks", "heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("format", FORMATS)
def test_a_rank_of_linear_layers_takes_what_vllm_loads(format: str, ranks: int, heads: int, kv_heads: int):
    torch.manual_seed(0)
    q, k, v = (torch.randn(n * HEAD, HIDDEN) for n in (heads, kv_heads, kv_heads))
    gate, up = (torch.randn(MIDDLE, HIDDEN) for _ in range(2))
    stacks: dict[str, Any] = {"qkv_proj": {"q": q, "k": k, "v": v}, "gate_up_proj": {0: gate, 1: up}}
    out = _parts(format, torch.randn(HIDDEN, heads * HEAD))
    shapes = {
        "qkv_proj": ((heads + 2 * kv_heads) * HEAD, HIDDEN),
        "o_proj": (HIDDEN, heads * HEAD),
        "gate_up_proj": (2 * MIDDLE, HIDDEN),
    }
    for rank in range(ranks):
        model = _layers(format, ranks, rank, heads, kv_heads)
        slots = find_slots(model)
        covered = shapes if format != "bf16" else {}
        found = formats.get(format)
        assert contract_hash(slots, found) == found.contract_hash(covered)
        for name, stack in stacks.items():
            pieces = {at: _parts(format, weight) for at, weight in stack.items()}
            layer = getattr(model, name)
            for part, param in slots[name].params.items():
                for at, piece in pieces.items():
                    layer.weight_loader_v2(getattr(layer, param), piece[part], at)
                published = torch.cat([piece[part] for piece in pieces.values()])
                _same(slots[name].cut, published, getattr(layer, param), slots[name].shape(part))
        for part, param in slots["o_proj"].params.items():
            model.o_proj.weight_loader_v2(getattr(model.o_proj, param), out[part])
            _same(slots["o_proj"].cut, out[part], getattr(model.o_proj, param), slots["o_proj"].shape(part))


def test_a_rank_of_an_embedding_takes_its_words_and_a_norm_is_whole():
    words, weights = torch.randn(VOCABULARY, HIDDEN), torch.randn(HIDDEN)
    for ranks in (1, 2, 4):
        seen = []
        for rank in range(ranks):
            model = _layers("bf16", ranks, rank, 4, 4)
            slots = find_slots(model)
            model.embed.weight_loader(model.embed.weight, words)
            n = slots["embed"].shape("weight")[0]
            _same(slots["embed"].cut, words, model.embed.weight[:n], (n, HIDDEN))
            seen.append(slots["embed"].cut.of(words))
            assert torch.equal(slots["norm"].cut.of(weights), weights)
        assert torch.equal(torch.cat(seen), words)


def _same(cut: Cut, published: Tensor, loaded: Tensor, shape: tuple[int, ...]) -> None:
    mine = cut.of(published)
    assert tuple(mine.shape) == shape == cut.spec(Spec.of(published)).shape
    assert torch.equal(mine.contiguous().view(torch.uint8), loaded.data.contiguous().view(torch.uint8))


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("format", FORMATS)
def test_a_rank_of_experts_takes_what_vllm_loads(format: str, ranks: int):
    """By the loaders of vLLM's experts, called as for a checkpoint: expert by expert, gate, up and down."""
    torch.manual_seed(0)
    n_experts = 3
    gate_up, down = torch.randn(n_experts, 2 * MIDDLE, HIDDEN), torch.randn(n_experts, HIDDEN, MIDDLE)
    w13, w2 = _parts(format, gate_up), _parts(format, down)
    for rank in range(ranks):
        sides = SimpleNamespace(tp_size=ranks)
        loader: Any = SimpleNamespace(moe_config=SimpleNamespace(is_act_and_mul=True, moe_parallel_config=sides))
        for helper in ("_get_hidden_dim", "_narrow_expert_data_for_padding", "_load_w13", "_load_w2"):
            method = vars(RoutedExperts)[helper]
            is_static = isinstance(method, staticmethod)
            setattr(loader, helper, method.__func__ if is_static else method.__get__(loader))
        cut13 = Cut.by_outputs([(MIDDLE, 1)] * 2, HIDDEN, rank, ranks)
        cut2 = Cut.by_inputs(HIDDEN, MIDDLE, rank, ranks)
        for codes in w13.values():
            loaded = torch.empty((n_experts, codes.shape[1] // ranks, codes.shape[2]), dtype=codes.dtype)
            for expert in range(n_experts):
                for at, piece in zip(("w1", "w3"), codes[expert].chunk(2), strict=True):
                    loader._load_w13(loaded[expert], 0, at, piece, rank)
            _same(cut13, codes, loaded, tuple(loaded.shape))
        for codes in w2.values():
            per_channel = codes.shape[-1] == 1
            width = codes.shape[2] if per_channel else codes.shape[2] // ranks
            loaded = torch.empty((n_experts, codes.shape[1], width), dtype=codes.dtype)
            for expert in range(n_experts):
                if per_channel:
                    vars(RoutedExperts)["_load_per_channel_weight_scale"](
                        loader, loaded[expert], 1, "w2", codes[expert], rank
                    )
                else:
                    loader._load_w2(loaded[expert], 1, codes[expert], rank)
            _same(cut2, codes, loaded, tuple(loaded.shape))


@pytest.mark.parametrize("format", FORMATS[1:])
def test_a_share_of_the_codes_is_a_share_of_the_weight(format: str):
    found = formats.get(format)
    weight = torch.randn(2, 64, 256)
    codes = quantizer(format, "cpu").quantize(weight, found.group)
    whole = quantizer(format, "cpu").dequantize(codes, found.group, torch.float32)
    for rank in range(4):
        for cut in (Cut.by_inputs(64, 256, rank, 4), Cut.by_outputs([(48, 1), (16, 1)], 256, rank, 4)):
            mine = {part: cut.of(values) for part, values in codes.items()}
            served = quantizer(format, "cpu").dequantize(mine, found.group, torch.float32)
            assert torch.equal(served, cut.of(whole))


def test_a_cut_through_a_group_is_refused():
    scales = quantizer("w4a16", "cpu").quantize(torch.randn(8, 384), 128)["weight_scale"]
    with pytest.raises(ValueError, match="0 to 192 of 384 cuts through one of the 3 entries"):
        Cut.by_inputs(8, 384, 0, 2).of(scales)


def test_a_tile_goes_to_the_rank_that_holds_its_columns():
    tile = Tile("w2", np.array([1, 9, 14]), np.arange(24, dtype=np.float32).reshape(8, 3))
    one, other = (Cut.by_inputs(8, 16, rank, 2).tile(tile) for rank in range(2))
    assert one is not None and other is not None
    np.testing.assert_array_equal(one.columns, [1])
    np.testing.assert_array_equal(other.columns, [1, 6])
    np.testing.assert_array_equal(np.concatenate([one.values, other.values], 1), tile.values)
    assert Cut.by_inputs(8, 16, 1, 2).tile(replace(tile, columns=tile.columns[:1], values=tile.values[:, :1])) is None
    mine = Cut.by_outputs([(4, 1), (4, 1)], 16, 1, 2).tile(tile)
    assert mine is not None
    np.testing.assert_array_equal(mine.values, tile.values[[2, 3, 6, 7]])


@pytest.fixture
def update(model_folder, published):
    return published(AutoModelForCausalLM.from_pretrained(model_folder("qwen3")), "w8a8_int8")


OUT = "model.layers.0.self_attn.o_proj"


def test_a_share_says_the_checksums_and_tiles_of_its_part(update):
    share = Share(HostDelivery(update), {name: Cut.whole(1, 1) for name in update.tensors} | {OUT: _half()})
    ((tensors),) = share.buckets()
    manifest = share.manifest()
    assert share.specs[OUT]["weight"].shape == (128, 64) and share.specs[OUT]["weight_scale"].shape == (128, 1)
    assert manifest.checksums[OUT]["weight"] == checksum(tensors[OUT]["weight"]) != update.checksums[OUT]["weight"]
    assert manifest.checksums["model.norm"] == update.checksums["model.norm"]
    assert OUT not in {tile.tensor for tile in manifest.tiles} and len(manifest.tiles) == len(update.tiles) - 1


def _half() -> Cut:
    """The one without the first column, which tiles of version 0 are of."""
    return Cut.by_inputs(128, 128, 1, 2)


def test_a_change_in_the_half_of_another_rank_is_named(update):
    """A rank proves the whole: its own half alone has no published checksum."""
    wire = update.tensors[OUT]["weight"]
    data = wire.data.copy()
    data[0] ^= 1
    broken = {**update.tensors, OUT: {**update.tensors[OUT], "weight": replace(wire, data=data)}}
    share = Share(HostDelivery(replace(update, tensors=broken)), {n: Cut.whole(1, 1) for n in broken} | {OUT: _half()})
    list(share.buckets())
    with pytest.raises(SyncError, match=rf"{OUT} \(weight\) was changed on the way"):
        share.manifest()


def test_what_the_engine_does_not_know_passes_to_be_refused_by_name(update):
    extra = {**update.tensors, "model.oops": {"weight": to_wire(torch.zeros(3, 5))}}
    share = Share(HostDelivery(replace(update, tensors=extra)), {})
    assert share.specs["model.oops"]["weight"].shape == (3, 5)
