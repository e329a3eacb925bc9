"""Which kernel computes a format, and by which backend on this machine. What cannot run is refused by name.

`bf16` has no kernel: callers ask `QuantFormat.quantizes` first and use `F.linear`.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor

from qarl.errors import ConfigError
from qarl.kernels import w4a16, w8a8_fp8, w8a8_int8

Codes = dict[str, Tensor]


class Kernel(Protocol):
    """The functions every format's module offers; what they mean stands in each module."""

    BACKENDS: tuple[str, ...]

    def quantize(self, weight: Tensor, group: int | None) -> Codes: ...
    def dequantize(self, codes: Codes, group: int | None, dtype: torch.dtype) -> Tensor: ...
    def prepare(self, codes: Codes, group: int | None, backend: str, dtype: torch.dtype) -> Any: ...
    def product(self, x: Tensor, prepared: Any, bias: Tensor | None) -> Tensor: ...
    def refusal(self, backend: str, device_type: str, dtype: torch.dtype) -> str | None: ...


_KERNELS = {"w8a8_int8": w8a8_int8, "w8a8_fp8": w8a8_fp8, "w4a16": w4a16, "w4a16_g32": w4a16}


def kernel(format_name: str) -> Kernel:
    """The module that computes a format. Raises `ConfigError` for one that has none (`bf16` among them)."""
    if format_name not in _KERNELS:
        raise ConfigError(f"rollout.format: {format_name!r} has no kernel; those that have one: {sorted(_KERNELS)}")
    return cast(Kernel, _KERNELS[format_name])


def backends(format_name: str, device_type: str, dtype: torch.dtype) -> dict[str, str | None]:
    """Backend -> `None` where it runs here, on that device and for inputs of `dtype`, else the reason. Asking about
    `engine` imports vLLM."""
    module = kernel(format_name)
    return {name: module.refusal(name, device_type, dtype) for name in module.BACKENDS}


def choose(format_name: str, backend: str, device_type: str, dtype: torch.dtype) -> str:
    """The backend to use: the one asked for; for `auto`, `engine` where it runs, else `emulated`.

    Raises `ConfigError` naming `learner.backend` where the one asked for does not run.
    """
    module = kernel(format_name)
    if backend == "auto":
        runs = "engine" in module.BACKENDS and module.refusal("engine", device_type, dtype) is None
        return "engine" if runs else "emulated"
    known_here = backend in module.BACKENDS
    reason = module.refusal(backend, device_type, dtype) if known_here else "the format has no such backend"
    if reason is not None:
        known = backends(format_name, device_type, dtype)
        choices = ["auto", *sorted(name for name, why in known.items() if why is None)]
        raise ConfigError(
            f"learner.backend: {backend!r} does not run {format_name} on {device_type} in {dtype} ({reason}); choices: {choices}"
        )
    return backend
