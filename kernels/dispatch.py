"""Which module computes a format by which backend, and what runs on this machine. What cannot run is refused by name.

`bf16` has none that can be asked for: callers ask `QuantFormat.quantizes` first and use `F.linear`. Its module, `plain`, is there
for packed experts alone.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from qarl.errors import ConfigError

Codes = dict[str, Tensor]

BACKENDS = ("engine", "fused", "emulated")
"""In the order in which `auto` prefers them."""


class Backend(Protocol):
    """The functions of every module: one module for each format and backend. Shapes: N output, K input features."""

    def quantize(self, weight: Tensor, group: int | None = None) -> Codes:
        """weight [N, K], or experts [E, N, K]; cast to bfloat16 first. The same bits in every backend."""

    def dequantize(self, codes: Codes, group: int | None, dtype: torch.dtype) -> Tensor:
        """Ŵ, in the weight's shape. The same bits in every backend."""

    def prepare(self, codes: Codes, group: int | None, dtype: torch.dtype) -> Any:
        """The operand of the products, of a matrix or of experts, for inputs of `dtype`."""

    def product(self, x: Tensor, operand: Any, bias: Tensor | None = None) -> Tensor:
        """x [M, K] -> [M, N] in x's dtype. M may be 0."""

    def grouped_product(self, x: Tensor, operand: Any, offsets: Tensor, row_weights: Tensor | None = None) -> Tensor:
        """x [M, K] sorted by expert -> [M, N]. offsets [E], integers: where each expert's rows end; rows after the last
        come out 0. row_weights [M] float32 multiply the rows of the result."""

    def refusal(self, device_type: str, dtype: torch.dtype) -> str | None:
        """Why it does not run on that device here for inputs of `dtype`; `None` where it does."""


class Quantizer(Protocol):
    """What definitions and `fused` modules do with weights besides; `quantize` and `dequantize` are those of `Backend`."""

    def quantize(self, weight: Tensor, group: int | None = None) -> Codes: ...

    def quantize_into(self, weight: Tensor, group: int | None, out: Codes) -> None:
        """`quantize`, written into these parts, which are contiguous."""

    def dequantize(self, codes: Codes, group: int | None, dtype: torch.dtype) -> Tensor: ...

    def columns(self, codes: Codes, group: int | None, at: Tensor) -> Tensor:
        """float32 [*, N, C]: the columns `at` int64 [C] of Ŵ, without the rest of it."""


_DEFINITIONS = {"w8a8_int8": "w8a8_int8", "w8a8_fp8": "w8a8_fp8", "w4a16": "w4a16", "w4a16_g32": "w4a16"}
_SUFFIX = {"engine": "_engine", "fused": "_fused", "emulated": ""}
_MARLIN = "vLLM's Marlin takes 1.8 times as long as bf16 at a learner's sizes; 'fused' computes Marlin's values"


@cache
def load(format_name: str, backend: str) -> Backend:
    """The module. Raises `ConfigError` for a format that has none (`bf16` among them), or not by that backend."""
    if (format_name, backend) == ("bf16", "plain"):  # asked for by no user: experts of a learner that quantizes nothing
        return cast(Backend, import_module("qarl.kernels.bf16"))
    if format_name not in _DEFINITIONS:
        raise ConfigError(f"rollout.format: {format_name!r} has no kernel; those that have one: {sorted(_DEFINITIONS)}")
    definition = _DEFINITIONS[format_name]
    if backend not in _SUFFIX:
        raise ConfigError(f"learner.backend: {backend!r} is no backend of {format_name}; choices: {list(BACKENDS)}")
    if (definition, backend) == ("w4a16", "engine"):
        raise ConfigError(f"learner.backend: {format_name} has no backend 'engine': {_MARLIN}")
    return cast(Backend, import_module(f"qarl.kernels.{definition}{_SUFFIX[backend]}"))


def quantizer(format_name: str, device_type: str) -> Quantizer:
    """The module to quantize and dequantize with on that device: the fastest that runs there, since all give the same bits."""
    fused = device_type == "cuda" and not (format_name == "w8a8_fp8" and _lacks_e4m3())
    return cast(Quantizer, load(format_name, "fused" if fused else "emulated"))


def _lacks_e4m3() -> bool:
    """Triton compiles e4m3 for Ada and later."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9)


def backends(format_name: str, device_type: str, dtype: torch.dtype) -> dict[str, str | None]:
    """Backend -> `None` where it runs here, on that device and for inputs of `dtype`, else the reason. Asking imports
    vLLM and Triton."""
    return {name: _refusal(format_name, name, device_type, dtype) for name in BACKENDS}


def choose(format_name: str, requested: str, device_type: str, dtype: torch.dtype) -> str:
    """The backend to use: the one asked for; for `auto`, the first of `BACKENDS` that runs.

    Raises `ConfigError` naming `learner.backend` where the one asked for does not run.
    """
    if requested == "auto":
        # Elsewhere Triton is left alone: its interpreter runs there, a thousand times slower than the definition.
        names = BACKENDS if device_type == "cuda" else ("engine", "emulated")
        return next(name for name in names if _refusal(format_name, name, device_type, dtype) is None)
    reason = _refusal(format_name, requested, device_type, dtype)
    if reason is not None:
        known = backends(format_name, device_type, dtype)
        choices = ["auto", *sorted(name for name, why in known.items() if why is None)]
        raise ConfigError(
            f"learner.backend: {requested!r} does not run {format_name} on {device_type} in {dtype} ({reason}); choices: {choices}"
        )
    return requested


def has_engine(device_type: str, dtype: torch.dtype) -> bool:
    """Whether vLLM's ops for that device and dtype are here; those of all formats come together."""
    return _refusal("w8a8_int8", "engine", device_type, dtype) is None


def _refusal(format_name: str, backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    if backend not in BACKENDS:
        return "there is no such backend"
    if _DEFINITIONS.get(format_name) == "w4a16" and backend == "engine":
        return _MARLIN
    try:
        return load(format_name, backend).refusal(device_type, dtype)
    except ModuleNotFoundError as missing:
        if missing.name != "triton":
            raise
        return "Triton is not installed"
