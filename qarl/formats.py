"""The grid contract: what is quantized, to what, at which granularity.

One frozen `QuantFormat` is read by learner, bridge, engine, tests, memory estimate and logs. It describes; the numbers are
made in `kernels/`, one file per format. No torch here, so that a plan or a refusal costs no import.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Literal

from qarl.errors import ConfigError

Shape = tuple[int, ...]

#: Leaf modules that no format ever quantizes, on either side. Whole names: `gate` is the MoE router and must not match `gate_proj`.
KEEP = ("embed_tokens", "lm_head", "*norm", "gate")


@dataclass(frozen=True)
class QuantFormat:
    """What every linear weight [N, K] (or packed experts [E, N, K]) and its input become in the sampler's arithmetic."""

    name: str
    """The name users write, e.g. `w8a8_int8`."""
    weight: Literal["bf16", "int8", "e4m3", "int4"]
    """The grid of a weight, before its scale."""
    activation: Literal["none", "int8", "e4m3"] = "none"
    """The grid of a layer's input; where not `none`, symmetric and dynamic, one scale per token."""
    group: int | None = None
    """Input features K that share a scale; `None`: one scale per output channel."""
    scale_rule: str = "none"
    """How a scale follows from the absolute maximum of what it covers."""
    scale_dtype: str = "none"
    """The dtype in which scales are stored. The learner computes with the stored scale, not the unrounded one."""
    source_dtype: str = "bfloat16"
    """Weights are cast to this before they are quantized, on both sides (two source dtypes make two grids)."""
    keep: tuple[str, ...] = KEEP
    """Leaf module names, as patterns, that stay as they are."""

    @property
    def quantizes(self) -> bool:
        """Whether anything is quantized at all."""
        return self.weight != "bf16"

    def covers(self, parameter: str, shape: Shape) -> bool:
        """Whether the parameter (its full dotted name in the model) is quantized.

        Covered are matrices [N, K] and packed experts [E, N, K] whose leaf module is not in `keep`. Packed experts are
        parameters without `.weight` (`mlp.experts.gate_up_proj`), so the module is named by the last part itself.
        """
        if not self.quantizes or len(shape) < 2:
            return False
        *path, leaf = parameter.split(".")
        module = path[-1] if leaf == "weight" else leaf
        return not any(fnmatch.fnmatchcase(module, pattern) for pattern in self.keep)

    def check_shape(self, parameter: str, shape: Shape) -> None:
        """Raise `ConfigError` where the group does not divide the input features of a covered parameter."""
        if self.group and self.covers(parameter, shape) and shape[-1] % self.group:
            raise ConfigError(
                f"rollout.format: {self.name!r} needs input features divisible by {self.group}, "
                f"but {parameter} has shape {list(shape)}"
            )

    def bits_per_weight(self, shape: Shape) -> float:
        """Bits stored for each weight of a covered parameter, scales counted."""
        code = {"bf16": 16, "int8": 8, "e4m3": 8, "int4": 4}[self.weight]
        scale = {"none": 0, "float32": 32, "bfloat16": 16}[self.scale_dtype]
        return code + scale / (self.group or shape[-1])

    def contract(self, tensors: Mapping[str, Shape]) -> dict:
        """The contract as plain data. `tensors`: name -> shape of every covered engine-fused tensor (`qarl.fusion`)."""
        return {**asdict(self), "keep": sorted(self.keep), "tensors": {k: list(tensors[k]) for k in sorted(tensors)}}

    def contract_hash(self, tensors: Mapping[str, Shape]) -> str:
        """Sixteen hex digits over `contract`; learner and engine each compute it from their own model and compare."""
        return hashlib.sha256(json.dumps(self.contract(tensors), sort_keys=True).encode()).hexdigest()[:16]


_INT8_RULE = "absmax/127"
FORMATS = {
    f.name: f
    for f in (
        QuantFormat("bf16", weight="bf16"),
        QuantFormat("w8a8_int8", "int8", "int8", scale_rule=_INT8_RULE, scale_dtype="float32"),
        QuantFormat("w8a8_fp8", "e4m3", "e4m3", scale_rule="absmax/448", scale_dtype="float32"),
        QuantFormat("w4a16", "int4", group=128, scale_rule="absmax/7.5", scale_dtype="bfloat16"),
        QuantFormat("w4a16_g32", "int4", group=32, scale_rule="absmax/7.5", scale_dtype="bfloat16"),
    )
}


def get(name: str, key: str = "rollout.format") -> QuantFormat:
    """The format of that name. Raises `ConfigError` naming `key` and the choices."""
    if name not in FORMATS:
        near = get_close_matches(name, FORMATS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{key}: {name!r} is not one of {sorted(FORMATS)}{hint}")
    return FORMATS[name]


@dataclass(frozen=True)
class Coverage:
    """How many linear weights a format reaches."""

    quantized: int
    linear: int
    bits: float
    """Stored bits of the quantized weights, scales counted."""

    def __str__(self) -> str:
        unit, size = ("B", 1e9) if self.linear >= 1e9 else ("M", 1e6)
        each = self.bits / self.quantized if self.quantized else 16.0
        return (
            f"{self.quantized / size:.3g} of {self.linear / size:.3g} {unit} linear weights quantized, "
            f"{each:.2f} bits each with scales"
        )


def coverage(format: QuantFormat, parameters: Mapping[str, Shape]) -> Coverage:
    """Count over a model's parameters (name -> shape). Linear weights are all of two or more dimensions but embeddings."""
    linear = {n: s for n, s in parameters.items() if len(s) >= 2 and "embed_tokens" not in n}
    covered = {n: s for n, s in linear.items() if format.covers(n, s)}
    bits = sum(math.prod(s) * format.bits_per_weight(s) for s in covered.values())
    return Coverage(sum(map(math.prod, covered.values())), sum(map(math.prod, linear.values())), bits)
