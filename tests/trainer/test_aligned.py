"""The aligned model against plain transformers with dequantized weights and inputs, forward and straight-through backward."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qarl import formats
from qarl.errors import ConfigError
from qarl.formats import get
from qarl.kernels.dispatch import load
from qarl.trainer import aligned as aligned_module
from qarl.trainer.aligned import AlignedModel, move_plain_experts
from qarl.trainer.attention import PACKED, positions

LENGTHS = [6, 1, 11]
TOKENS = torch.randint(48, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))


def open_model(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=PACKED)
    return model


def logits(model):
    return model(TOKENS, position_ids=positions(LENGTHS), sequence_lengths=LENGTHS, use_cache=False).logits[0]


def on_grid(model, format):
    """The model with the weights the sampler has."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if format.covers(name, tuple(parameter.shape)):
                codes = load(format.name, "emulated").quantize(parameter, format.group)
                parameter.copy_(load(format.name, "emulated").dequantize(codes, format.group, torch.float32))
    return model


def round_inputs(model, format, ranks=1):
    """Inputs of covered linear layers put on their grid, straight through; for packed experts in the loop of transformers. Those
    of layers that an engine's ranks sum, in as many pieces."""
    module: Any = load(format.name, "emulated")

    def rounded(x):
        codes, scale = module.quantize_tokens(x.detach().reshape(-1, x.shape[-1]))
        return x + ((codes.float() * scale).reshape(x.shape) - x).detach()

    def in_pieces(x):
        return torch.cat([rounded(piece) for piece in x.chunk(ranks, -1)], -1)

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and format.covers(f"{name}.weight", tuple(layer.weight.shape)):
            how = in_pieces if name.endswith(("o_proj", "down_proj")) else rounded
            layer.register_forward_pre_hook(lambda _, inputs, how=how: (how(inputs[0]),))
        elif hasattr(layer, "gate_up_proj") and isinstance(layer.gate_up_proj, nn.Parameter):
            layer.forward = lambda x, index, weights, layer=layer: experts(layer, x, index, weights, rounded, in_pieces)


def experts(layer, hidden, index, weights, rounded, in_pieces):
    """One token and one expert at a time."""
    rows = []
    for token in range(len(hidden)):
        row = torch.zeros(1, hidden.shape[1])
        for expert, weight in zip(index[token].tolist(), weights[token], strict=True):
            gate, up = (rounded(hidden[token : token + 1]) @ layer.gate_up_proj[expert].T).chunk(2, dim=-1)
            row = row + weight * (in_pieces(layer.act_fn(gate) * up) @ layer.down_proj[expert].T)
        rows.append(row)
    return torch.cat(rows)


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize(
    ("name", "ranks"), [("w8a8_int8", 1), ("w8a8_int8", 2), ("w8a8_fp8", 1), ("w8a8_fp8", 2), ("w4a16_g32", 1)]
)
def test_aligned_model_equals_transformers_on_the_grid(models, kind, name, ranks):
    format = get(name)
    model, reference = open_model(models[kind]), on_grid(open_model(models[kind]), format)
    aligned = AlignedModel(model, format, "emulated", "cpu", torch.float32, ranks)
    if format.activation != "none":
        round_inputs(reference, format, ranks)
    elif kind == "moe":
        reference.set_experts_implementation("eager")
    ours, theirs = logits(model), logits(reference)
    # Float32 summation order moves an input of a layer over a rounding edge now and then: one code of one token.
    tolerance = 1e-4 if format.activation == "none" else 2e-2
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
    # Ranks that are ignored, or activations that are not rounded, move the mean by 0.08 of the tolerance and more.
    assert (ours - theirs).abs().mean() <= 0.02 * tolerance * theirs.abs().max()
    assert (ours - logits(open_model(models[kind]))).abs().max() > 1e-3 * theirs.abs().max(), (
        "and it is not the plain model"
    )
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for (parameter_name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        limit = (1e-3 if format.activation == "none" else 0.05) * b.grad.abs().max()
        assert (a.grad - b.grad).abs().max() <= limit, parameter_name
    assert aligned.backend == "emulated"


@pytest.mark.parametrize(
    ("kind", "major", "waits"),
    [("moe", 8, True), ("moe", 9, False), ("moe", 10, False), ("moe", 12, True), ("dense", 8, False)],
)
def test_a_forward_waits_for_the_host_where_torchs_grouped_product_does(models, monkeypatch, kind, major, waits):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    model = open_model(models[kind])
    assert AlignedModel(model, get("bf16"), "none", "cpu", torch.bfloat16).waits_for_host == waits
    assert AlignedModel(model, get("bf16"), "none", "cpu", torch.float32).waits_for_host == (kind == "moe")


def test_experts_multiply_by_the_function_that_saves_one_tensor(models, monkeypatch):
    """Where their activation is silu, as transformers names it."""
    calls = []
    compute = aligned_module.silu_and_multiply

    def counted(gate_up):
        calls.append(gate_up.shape)
        return compute(gate_up)

    monkeypatch.setattr(aligned_module, "silu_and_multiply", counted)
    model = open_model(models["moe"])
    AlignedModel(model, get("w8a8_int8"), "emulated", "cpu", torch.float32)
    logits(model)
    assert len(calls) == len(model.model.layers)


def test_covered_is_what_the_format_covers(models):
    model = open_model(models["moe"])
    aligned = AlignedModel(model, get("w8a8_int8"), "emulated", "cpu", torch.float32)
    names = {name.removeprefix("model.layers.0.") for name in aligned.covered if "layers.0" in name}
    attention = {f"self_attn.{p}_proj.weight" for p in "qkvo"}
    assert names == attention | {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


def test_backend_none_leaves_the_model_alone(models):
    model = open_model(models["dense"])
    expected = logits(model)
    AlignedModel(model, get("w8a8_int8"), "none", "cpu", torch.float32)
    assert torch.equal(logits(model), expected)


def test_stale_codes_are_served_until_invalidated(models):
    """The cache works, and `invalidate` empties it."""
    model = open_model(models["dense"])
    aligned = AlignedModel(model, get("w4a16_g32"), "emulated", "cpu", torch.float32)
    with torch.no_grad():
        before = logits(model)
        for name, parameter in model.named_parameters():
            if name in aligned.covered:
                parameter.mul_(2)
        assert torch.equal(logits(model), before)
        aligned.invalidate()
        assert not torch.allclose(logits(model), before)


@pytest.mark.parametrize(
    ("name", "backend", "line"),
    [
        ("bf16", "none", "nothing is quantized, other ops torch"),
        ("w8a8_fp8", "none", "not aligned (learner.backend is none)"),
        ("w8a8_fp8", "emulated", "products emulated, other ops torch"),
        ("w4a16_g32", "emulated", "products emulated (dequantized as Marlin does), other ops torch"),
    ],
)
def test_one_line_says_how_it_computes(models, name, backend, line):
    assert AlignedModel(open_model(models["dense"]), get(name), backend, "cpu", torch.float32).describe() == line


@pytest.mark.parametrize(
    ("requested", "chosen", "here", "follows"),
    [
        ("auto", "engine", True, True),
        ("engine", "engine", True, True),
        ("auto", "fused", True, True),
        ("auto", "fused", False, False),
        ("fused", "fused", True, False),
        ("auto", "emulated", True, False),
    ],
)
def test_other_ops_are_the_engines_where_its_values_are_wanted(models, monkeypatch, requested, chosen, here, follows):
    """With `auto` and int4 on a GPU the products are ours, and the rest is vLLM's."""
    followed = []
    monkeypatch.setattr(aligned_module, "choose", lambda *arguments: chosen)
    monkeypatch.setattr(aligned_module, "has_engine", lambda *arguments: here)
    monkeypatch.setattr(aligned_module, "follow_engine", lambda model, device: followed.append(device))
    aligned = AlignedModel(open_model(models["dense"]), get("w4a16_g32"), requested, "cpu", torch.float32)
    assert aligned.backend == chosen and aligned.follows_engine == follows
    assert followed == (["cpu"] if follows else [])
    assert f"other ops {'engine' if follows else 'torch'}" in aligned.describe()


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize(
    ("requested", "here", "known", "dtype", "follows"),
    [
        ("auto", True, True, torch.bfloat16, True),
        ("auto", True, True, torch.float32, False),
        ("auto", False, True, torch.bfloat16, False),
        ("auto", True, False, torch.bfloat16, False),
        ("none", True, True, torch.bfloat16, False),
        ("emulated", True, True, torch.bfloat16, False),
    ],
)
def test_by_auto_a_model_that_is_not_quantized_follows_too_where_it_is_known_how(
    models, monkeypatch, kind, requested, here, known, dtype, follows
):
    followed: list[str] = []
    monkeypatch.setattr(aligned_module, "has_engine", lambda *arguments: here)
    monkeypatch.setattr(aligned_module, "follow_engine", lambda model, device: followed.append(device))
    model = open_model(models[kind])
    if not known:
        model.config.model_type = "mistral"
    aligned = AlignedModel(model, get("bf16"), requested, "cuda", dtype)
    assert aligned.backend == "none" and aligned.follows_engine == follows
    assert followed == (["cuda"] if follows else [])
    assert aligned.describe() == f"nothing is quantized, other ops {'engine' if follows else 'torch'}"
    moved = [isinstance(module.forward, aligned_module._Experts) for module in model.modules()]
    assert sum(moved) == (len(model.model.layers) if kind == "moe" and dtype == torch.bfloat16 else 0)


def test_router_weights_of_a_bfloat16_model_are_float32(models):
    """vLLM's are. In float32 nothing changes: the logits above agree with transformers'."""
    model = AutoModelForCausalLM.from_pretrained(models["moe"], dtype=torch.bfloat16)
    router = model.model.layers[0].mlp.gate
    hidden = torch.randn(5, router.hidden_dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits, rounded, experts = router(hidden)
    AlignedModel(model, get("w8a8_int8"), "emulated", "cpu", torch.bfloat16)
    same_logits, weights, same_experts = router(hidden)
    assert rounded.dtype == torch.bfloat16 and weights.dtype == torch.float32
    assert torch.equal(logits, same_logits) and torch.equal(experts, same_experts)
    assert torch.equal(weights.bfloat16(), rounded)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_compiled_model_gives_the_same_numbers(models, kind):
    """Its graph breaks at the aligned layers; what lies between is traced."""
    model = open_model(models[kind])
    AlignedModel(model, get("w8a8_int8"), "emulated", "cpu", torch.float32)
    expected = logits(model)
    expected.square().sum().backward()
    grads = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    compiled = logits(torch.compile(model, backend="eager"))
    compiled.square().sum().backward()
    assert torch.equal(compiled, expected)
    assert all(torch.equal(parameter.grad, grads[name]) for name, parameter in model.named_parameters())


def test_a_layer_without_aligned_forward_is_refused():
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = nn.Bilinear(4, 4, 4)

    with pytest.raises(ConfigError, match="mixer.weight"):
        AlignedModel(Strange(), get("w8a8_int8"), "emulated", "cpu", torch.float32)


def test_a_group_that_does_not_divide_is_refused(models):
    with pytest.raises(ConfigError, match="divisible by 128"):
        AlignedModel(open_model(models["dense"]), get("w4a16"), "emulated", "cpu", torch.float32)


def test_there_are_no_formats_but_these():
    assert set(formats.FORMATS) == {"bf16", "w8a8_int8", "w8a8_fp8", "w4a16", "w4a16_g32"}


def test_plain_experts_equal_those_of_transformers_forward_and_backward(models):
    """What a GPU's learner computes where nothing is quantized."""
    ours, theirs = open_model(models["moe"]), open_model(models["moe"])
    theirs.set_experts_implementation("eager")
    move_plain_experts(ours)
    a, b = logits(ours), logits(theirs)
    assert torch.allclose(a, b, atol=1e-5, rtol=1e-5)
    weights = torch.randn(a.shape, generator=torch.Generator().manual_seed(1))
    for output in (a, b):
        (output * weights).sum().backward()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (mine.grad - other.grad).abs().max() <= 1e-4 * other.grad.abs().max(), name


def test_plain_experts_of_an_architecture_not_known_stay_as_they_are():
    """They may clamp their gates, as those of DeepSeek 4 do, under the same names of parameters."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj, self.down_proj = nn.Parameter(torch.zeros(2, 8, 4)), nn.Parameter(torch.zeros(2, 4, 4))

    model = nn.Sequential(Experts())
    move_plain_experts(model)
    assert "forward" not in vars(model[0])
