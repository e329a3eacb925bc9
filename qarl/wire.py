"""Tensors as bytes and back, and what a published tensor is without them.

numpy has neither bfloat16 nor float8, so a tensor crosses a process border as its bytes (`records.WireTensor`). Receiving
copies nothing: the tensor is a view of the bytes, which Ray maps read-only, so nobody may write to it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qarl.errors import SyncError
from qarl.formats import QuantFormat, Shape
from qarl.fusion import covered_shapes, fused_shapes
from qarl.kernels.dispatch import load
from qarl.records import WireTensor


@dataclass(frozen=True)
class Spec:
    """What a part of a tensor is, but for its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        return cls(tensor.dtype, tuple(tensor.shape))


Specs = Mapping[str, Mapping[str, Spec]]
"""Fused name -> part -> spec."""


def published_specs(
    parameters: Mapping[str, Shape], format: QuantFormat, dtype: torch.dtype
) -> dict[str, dict[str, Spec]]:
    """What a model of these parameters publishes, in their order; tensors that the format keeps are of `dtype`.

    Raises `ConfigError` where a group does not divide.
    """
    for name, shape in parameters.items():
        format.check_shape(name, shape)
    covered = covered_shapes(parameters, format)
    specs: dict[str, dict[str, Spec]] = {}
    for name, shape in fused_shapes(parameters).items():
        if name in covered:
            blank = torch.empty(shape, dtype=torch.bfloat16, device="meta")
            codes = load(format.name, "emulated").quantize(blank, format.group)
            specs[name] = {part: Spec.of(code) for part, code in codes.items()}
        else:
            specs[name] = {"bias" if name.endswith(".bias") else "weight": Spec(dtype, shape)}
    return specs


def to_wire(tensor: Tensor) -> WireTensor:
    """The tensor's bytes, dtype and shape. A view of the tensor's memory where that is on the CPU and contiguous."""
    data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    return WireTensor(data, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def spec_of(name: str, part: str, wire: WireTensor) -> Spec:
    """Its spec. Raises `SyncError` for a dtype that torch does not have."""
    dtype = getattr(torch, wire.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise SyncError(f"{name} ({part}) did not arrive whole: {wire.dtype!r} is not a torch dtype")
    return Spec(dtype, tuple(wire.shape))


def from_wire(wire: WireTensor) -> Tensor:
    """The tensor on the CPU, a view of `wire.data`: read it, never write to it. Raises `ValueError` if the bytes do not fit."""
    dtype = getattr(torch, wire.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{wire.dtype!r} is not a torch dtype")
    if wire.data.nbytes != torch.Size(wire.shape).numel() * dtype.itemsize:
        raise ValueError(f"{wire.data.nbytes} bytes do not make a {wire.dtype} tensor of shape {list(wire.shape)}")
    with warnings.catch_warnings():  # torch warns that Ray's read-only bytes could be written through the view
        warnings.filterwarnings("ignore", message=".*not writable")
        return torch.from_numpy(wire.data).view(dtype).reshape(wire.shape)


def named_sums(specs: Mapping[str, Mapping[str, object]], sums: Tensor) -> dict[str, dict[str, int]]:
    """Pending checksums int64 [parts], in the order of `specs`, as numbers: one transfer from the device."""
    values = iter(sums.tolist())
    return {name: {part: next(values) % (1 << 64) for part in parts} for name, parts in specs.items()}
