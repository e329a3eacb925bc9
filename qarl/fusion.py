"""Names of the engine's fused tensors: learner and engine meet on these.

The model in transformers keeps q, k, v (and gate, up) apart; the engine stacks them along the output features. Scales are per
output channel or per group of inputs, so stacking changes no code: it only renames. Published tensors are named as the engine
names its *modules*, without a suffix: `model.layers.0.self_attn.qkv_proj`, `model.layers.0.mlp.experts.w13`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from qarl.formats import QuantFormat, Shape

#: fused leaf -> the leaves it stacks, in this order along the output features
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
#: packed experts of transformers -> the engine's name (w13 stacks gate, then up, as transformers does)
EXPERTS = {"experts.gate_up_proj": "experts.w13", "experts.down_proj": "experts.w2"}

#: leaves whose inputs an engine of several ranks cuts; ranks sum what comes out
SUMMED = ("o_proj", "down_proj")


def is_summed(parameter: str) -> bool:
    """Whether it is the weight, of a layer or of packed experts, of a product that ranks sum."""
    return parameter.removesuffix(".weight").rpartition(".")[2] in SUMMED


def engine_name(parameter: str) -> tuple[str, int]:
    """(fused name, place in the stack) of a parameter of the transformers model.

    `…q_proj.weight -> (…qkv_proj, 0)`; `…o_proj.weight -> (…o_proj, 0)`; `…norm.weight -> (…norm, 0)`; biases keep their
    suffix: `…q_proj.bias -> (…qkv_proj.bias, 0)`.
    """
    for packed, name in EXPERTS.items():
        if parameter.endswith(packed):
            return parameter.removesuffix(packed) + name, 0
    module, _, kind = parameter.rpartition(".")
    path, _, leaf = module.rpartition(".")
    suffix = "" if kind == "weight" else f".{kind}"
    for fused, parts in FUSED.items():
        if leaf in parts:
            return f"{path}.{fused}{suffix}", parts.index(leaf)
    return module + suffix, 0


def fuse(parameters: Iterable[str]) -> dict[str, list[str]]:
    """Fused name -> the parameters it stacks, in order; names in order of first appearance."""
    fused: dict[str, list[tuple[int, str]]] = {}
    for parameter in parameters:
        name, place = engine_name(parameter)
        fused.setdefault(name, []).append((place, parameter))
    return {name: [p for _, p in sorted(parts)] for name, parts in fused.items()}


def fused_shapes(parameters: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shapes after fusing: output features (the last but one dimension; the only one of a bias) add up."""
    shapes: dict[str, Shape] = {}
    for name, parts in fuse(parameters).items():
        first = parameters[parts[0]]
        axis = max(len(first) - 2, 0)
        rows = sum(parameters[p][axis] for p in parts)
        shapes[name] = (*first[:axis], rows, *first[axis + 1 :])
    return shapes


def module_of(fused: str) -> str:
    """The engine's module that holds this tensor: experts hold w13 and w2, a linear layer its bias."""
    path, _, leaf = fused.removesuffix(".bias").rpartition(".")
    return path if f"experts.{leaf}" in EXPERTS.values() else fused.removesuffix(".bias")


def covered_shapes(parameters: Mapping[str, Shape], format: QuantFormat) -> dict[str, Shape]:
    """Fused name -> shape of what the format quantizes in a model of these parameters."""
    return fused_shapes({name: shape for name, shape in parameters.items() if format.covers(name, shape)})
