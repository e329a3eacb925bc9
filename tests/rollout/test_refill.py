"""The pieces of a refill that need no GPU."""

import torch
from vllm.model_executor.layers.linear import LinearBase

from qarl import formats
from qarl.kernels.dispatch import quantizer
from qarl.rollout import refill
from qarl.rollout.vllm_engine import VllmEngine


def _a_linear_layer(engine: VllmEngine) -> tuple[str, torch.nn.Module]:
    return next((n, m) for n, m in engine._model.named_modules() if isinstance(m, LinearBase))


def test_a_stand_in_is_processed_without_touching_the_layer(start, weights, published):
    engine = start("vllm", "w8a8_int8", "qwen3")
    engine.refill(published(weights("qwen3", 1), "w8a8_int8"))
    name, layer = _a_linear_layer(engine)
    x = torch.randn(5, layer.input_size_per_partition)
    served = layer.quant_method.apply(layer, x, None)
    members = {n: p for n, p in layer._parameters.items() if p is not None}
    values = {n: p.detach().clone() for n, p in members.items()}
    kernel, scheme = layer.scheme.kernel, dict(vars(layer.scheme))

    slot = refill.slots(engine._model)[name]
    other = quantizer("w8a8_int8", "cpu").quantize(torch.randn(slot.shape("weight")))
    stand_in = refill._stand_in(layer)
    for part, values_of_part in other.items():
        stand_in._parameters[part] = refill._raw(slot, part, values_of_part)
    stand_in.quant_method.process_weights_after_loading(stand_in)

    assert {n: p for n, p in layer._parameters.items() if p is not None} == members
    assert all(torch.equal(p, values[n]) for n, p in members.items())
    assert layer.scheme.kernel is kernel and dict(vars(layer.scheme)) == scheme
    torch.testing.assert_close(layer.quant_method.apply(layer, x, None), served, rtol=0, atol=0)
    assert not torch.allclose(stand_in.quant_method.apply(stand_in, x, None), served)


def test_int4_experts_are_published_with_outputs_first_though_vllm_holds_inputs_first():
    """vLLM marks such parameters; codes of eight inputs stay in one word, so the two differ by a transpose."""
    held = torch.nn.Parameter(torch.empty(3, 16, 32, dtype=torch.int32, device="meta"), requires_grad=False)
    assert not refill._is_transposed(held)
    held.is_transposed = True  # type: ignore[attr-defined]
    assert refill._is_transposed(held)
    module = torch.nn.Module()
    module.w13_weight_packed = held
    slot = refill.Slot("layers.0.mlp.experts.w13", module, {"weight_packed": "w13_weight_packed"})
    assert slot.shape("weight_packed") == (3, 32, 16)
    codes = quantizer("w4a16_g32", "cpu").quantize(torch.randn(3, 32, 128), formats.get("w4a16_g32").group)
    assert slot.shape("weight_packed") == tuple(codes["weight_packed"].shape)
    raw = refill._raw(slot, "weight_packed", codes["weight_packed"])
    assert torch.equal(raw[1, 2], codes["weight_packed"][1, :, 2])
