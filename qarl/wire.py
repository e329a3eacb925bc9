"""Tensors as bytes and back, with the checksum that both sides compare.

numpy has neither bfloat16 nor float8, so a tensor crosses a process border as its bytes (`records.WireTensor`). Receiving
copies nothing: the tensor is a view of the bytes, which Ray maps read-only, so nobody may write to it.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from qarl.errors import SyncError
from qarl.kernels.checksum import checksum
from qarl.records import WireTensor


def to_wire(tensor: Tensor) -> WireTensor:
    """The tensor's bytes, dtype, shape and checksum. A view of the tensor's memory where that is on the CPU and contiguous."""
    tensor = tensor.detach().contiguous()
    data = tensor.cpu().reshape(-1).view(torch.uint8).numpy()
    return WireTensor(data, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), checksum(tensor))


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


def verify(name: str, part: str, wire: WireTensor) -> Tensor:
    """The tensor, its checksum proved. Raises `SyncError` naming tensor and part."""
    try:
        tensor = from_wire(wire)
    except ValueError as error:
        raise SyncError(f"{name} ({part}) did not arrive whole: {error}") from error
    found = checksum(tensor)
    if found != wire.checksum:
        raise SyncError(f"{name} ({part}) was changed on the way: checksum {found:#x}, published {wire.checksum:#x}")
    return tensor
