"""The pieces of a refill that need no GPU."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload.layerwise import record_metadata_for_reloading

from qarl import formats
from qarl.kernels.checksum import pending
from qarl.kernels.dispatch import quantizer
from qarl.rollout import probe, refill
from qarl.rollout.layout import Plain, homes
from qarl.rollout.slots import Slot, contract_hash, find_slots, is_transposed
from qarl.rollout.vllm_engine import VllmEngine


def _a_linear_layer(engine: VllmEngine) -> tuple[str, Any]:
    return next((n, m) for n, m in engine._refill.model.named_modules() if isinstance(m, LinearBase))


def test_a_stand_in_is_processed_without_touching_the_layer(start, weights, published):
    engine = start("vllm", "w8a8_int8", "qwen3")
    engine.refill(published(weights("qwen3", 1), "w8a8_int8"))
    name, layer = _a_linear_layer(engine)
    x = torch.randn(5, layer.input_size_per_partition)
    served = layer.quant_method.apply(layer, x, None)
    members = {n: p for n, p in layer._parameters.items() if p is not None}
    values = {n: p.detach().clone() for n, p in members.items()}
    kernel, scheme = layer.scheme.kernel, dict(vars(layer.scheme))

    slot = engine._refill.slots[name]
    other = quantizer("w8a8_int8", "cpu").quantize(torch.randn(slot.shape("weight")))
    stand_in = refill._stand_in(layer)
    for part, values_of_part in other.items():
        stand_in._parameters[part] = refill._raw(slot, part, values_of_part)
    with set_current_vllm_config(engine._core.engine_core.vllm_config):
        stand_in.quant_method.process_weights_after_loading(stand_in)

    assert {n: p for n, p in layer._parameters.items() if p is not None} == members
    assert all(torch.equal(p, values[n]) for n, p in members.items())
    assert layer.scheme.kernel is kernel and dict(vars(layer.scheme)) == scheme
    torch.testing.assert_close(layer.quant_method.apply(layer, x, None), served, rtol=0, atol=0)
    assert not torch.allclose(stand_in.quant_method.apply(stand_in, x, None), served)


E, H, M, GROUP = 3, 64, 32, 32
INT4 = quantizer("w4a16_g32", "cpu")


class _Experts:
    """Where vLLM keeps the step between an expert layer's two products."""

    def activation(self, _kind: str, output: Tensor, input: Tensor) -> None:
        gate, up = input.chunk(2, -1)
        output.copy_(nn.functional.silu(gate) * up)


class _Int4ExpertsMethod(QuantizeMethodBase):
    """As vLLM's for Marlin: new parameters under the old names, a second name, a kernel object made with them."""

    def create_weights(self, *_: Any, **__: Any) -> None: ...

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        for name in ("w13", "w2"):
            repacked = nn.Parameter(getattr(layer, f"{name}_weight_packed").data.flip(0).clone(), requires_grad=False)
            setattr(layer, f"{name}_weight_packed", repacked)
            setattr(layer, f"{name}_weight", repacked)
        self.moe_kernel = SimpleNamespace(fused_experts=_Experts())

    def apply(self, layer: Any, x: Tensor, weights: Tensor, experts: Tensor, *_: Any) -> Tensor:
        def product(name: str, rows: Tensor) -> Tensor:
            codes = {"weight_packed": getattr(layer, f"{name}_weight").flip(0).mT.contiguous(),
                     "weight_scale": getattr(layer, f"{name}_weight_scale").mT.contiguous()}  # fmt: skip
            dense = INT4.dequantize(codes, GROUP, torch.bfloat16)[experts[:, 0].long()]
            return (dense @ rows[..., None])[..., 0]

        inner = x.new_empty(len(x), M)
        self.moe_kernel.fused_experts.activation("silu", inner, product("w13", x))
        return product("w2", inner) * weights.to(x.dtype)


def _int4_experts() -> nn.Module:
    """A model of one layer of experts whose parameters are named, shaped and marked as vLLM's, and processed."""
    layer: Any = nn.Module()
    layer.local_num_experts, layer.hidden_size = E, H
    layer.moe_config = SimpleNamespace(tp_rank=0, tp_size=1)
    for name, rows, inputs in (("w13", 2 * M, H), ("w2", H, M)):
        packed = torch.zeros(E, inputs // 8, rows, dtype=torch.int32)
        scale = torch.zeros(E, inputs // GROUP, rows, dtype=torch.bfloat16)
        for part, tensor in (("packed", packed), ("scale", scale)):
            parameter: Any = nn.Parameter(tensor, requires_grad=False)
            parameter.is_transposed = True
            setattr(layer, f"{name}_weight_{part}", parameter)
        setattr(layer, f"{name}_weight_g_idx", nn.Parameter(torch.zeros(E, inputs, dtype=torch.int32), False))
        setattr(layer, f"{name}_g_idx_sort_indices", nn.Parameter(torch.zeros(E, inputs, dtype=torch.int32), False))
    layer.quant_method = _Int4ExpertsMethod()
    model: Any = nn.Module()
    model.experts = nn.Module()
    model.experts.routed_experts = layer
    model.norm = nn.RMSNorm(H, dtype=torch.bfloat16)
    record_metadata_for_reloading(model)
    layer.quant_method.process_weights_after_loading(layer)
    return model


def test_int4_experts_are_refilled_in_place_and_probed_through_both_products():
    model: Any = _int4_experts()
    layer, format = model.experts.routed_experts, formats.get("w4a16_g32")
    found = find_slots(model)
    assert set(found) == {"experts.w13", "experts.w2", "norm"}
    assert contract_hash(found, format) == format.contract_hash({"experts.w13": (E, 2 * M, H), "experts.w2": (E, H, M)})
    addresses = {name: p.data_ptr() for name, p in layer.named_parameters()}
    kernel = layer.quant_method.moe_kernel
    for seed in (0, 1):
        torch.manual_seed(seed)
        shapes = {"experts.w13": (E, 2 * M, H), "experts.w2": (E, H, M)}
        codes = {name: INT4.quantize(torch.randn(shape), GROUP) for name, shape in shapes.items()}
        raw = {param: refill._raw(found[name], part, codes[name][part])
               for name in codes for part, param in found[name].params.items()}  # fmt: skip
        refill._load_on_gpu(layer, raw)
        assert {name: p.data_ptr() for name, p in layer.named_parameters()} == addresses
        assert layer.quant_method.moe_kernel is kernel
        columns = np.array([0, 5, 9, 31])
        for name, parts in codes.items():
            expected = INT4.dequantize(parts, GROUP, torch.bfloat16)[..., columns].float().numpy()
            np.testing.assert_array_equal(probe.served_columns(found, name, columns), expected)


def test_int4_experts_are_published_with_outputs_first_though_vllm_holds_inputs_first():
    """vLLM marks such parameters; codes of eight inputs stay in one word, so the two differ by a transpose."""
    held = torch.nn.Parameter(torch.empty(3, 16, 32, dtype=torch.int32, device="meta"), requires_grad=False)
    assert not is_transposed(held)
    held.is_transposed = True  # type: ignore[attr-defined]
    assert is_transposed(held)
    module = torch.nn.Module()
    module.w13_weight_packed = held
    slot = Slot("layers.0.mlp.experts.w13", module, {"weight_packed": "w13_weight_packed"})
    assert slot.shape("weight_packed") == (3, 32, 16)
    codes = quantizer("w4a16_g32", "cpu").quantize(torch.randn(3, 32, 128), formats.get("w4a16_g32").group)
    assert slot.shape("weight_packed") == tuple(codes["weight_packed"].shape)
    raw = refill._raw(slot, "weight_packed", codes["weight_packed"])
    assert torch.equal(raw[1, 2], codes["weight_packed"][1, :, 2])


def test_a_square_weight_that_vllm_keeps_transposed_is_known_by_how_it_lies():
    weight = torch.randint(-127, 128, (64, 64), dtype=torch.int8)
    model: Any = nn.Module()
    model.layer = nn.Module()
    model.layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    record_metadata_for_reloading(model)
    model.layer.weight = nn.Parameter(model.layer.weight.data.t(), requires_grad=False)  # as for CUTLASS
    found = homes(Slot("layer", model.layer, {"weight": "weight"}))
    assert found is not None
    assert found["weight"].pending().item() == pending(weight).item()
    other = torch.randint(-127, 128, (64, 64), dtype=torch.int8)
    found["weight"].write(other)
    assert torch.equal(model.layer.weight.t(), other)


@pytest.mark.parametrize(("outputs", "group"), [(128, 32), (64, 128)])
def test_int4_in_marlins_order_is_written_and_summed_as_it_was_published(outputs: int, group: int):
    """On the CPU by Triton's interpreter; that vLLM's kernel has this order is tested beside it (test_marlin)."""
    codes = quantizer("w4a16_g32", "cpu").quantize(torch.randn(outputs, 128), group)
    n, words = codes["weight_packed"].shape
    model: Any = nn.Module()
    model.layer = nn.Module()
    for part, values in codes.items():
        setattr(model.layer, part, nn.Parameter(torch.empty_like(values), requires_grad=False))
    record_metadata_for_reloading(model)
    model.layer.weight_packed = nn.Parameter(torch.empty(words // 2, 2 * n, dtype=torch.int32), requires_grad=False)
    scales = torch.empty(codes["weight_scale"].T.shape, dtype=torch.bfloat16)
    model.layer.weight_scale = nn.Parameter(scales, requires_grad=False)
    found = homes(Slot("layer", model.layer, {part: part for part in codes}))
    assert found is not None
    for part, home in found.items():
        home.write(codes[part])
        assert home.pending().item() == pending(codes[part]).item()
    model.layer.weight_packed.data[0, 0] ^= 16
    assert found["weight_packed"].pending().item() != pending(codes["weight_packed"]).item()


def test_where_tensors_live_is_found_anew_until_a_refill_was_proved(start, weights, published):
    """A home that is not the layer's would agree with itself, written and read back."""
    engine, model = start("vllm", "bf16", "llama"), weights("llama", 2)
    engine.refill(published(model, "bf16", 0))
    proved = engine.score([np.arange(5, 25, dtype=np.int32)], [1])
    elsewhere = {"model.norm": {"weight": Plain(torch.zeros_like(model.model.norm.weight))}}
    engine.version, engine._refill.homes = None, elsewhere
    engine.refill(published(model, "bf16", 1))
    assert engine._refill.homes == {} and engine.version == 1
    np.testing.assert_array_equal(engine.score([np.arange(5, 25, dtype=np.int32)], [1]), proved)
