"""The proof of a weight sync, the engine's half: what arrived is what was published, and what is served is what arrived.

Three stages, each naming the tensor that fails: the contract (both sides mean the same grids and the same tensors), the
bytes (names, shapes, dtypes, checksums), and, once loaded, a few dequantized columns read back through the live layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qarl import wire
from qarl.errors import SyncError
from qarl.formats import QuantFormat
from qarl.records import Tile, WeightUpdate, WireTensor


@dataclass(frozen=True)
class Spec:
    """What an engine's model wants of one part of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


Parts = Mapping[str, Spec]


def checked(
    update: WeightUpdate, expected: Mapping[str, Parts], format: QuantFormat, contract_hash: str
) -> dict[str, dict[str, Tensor]]:
    """The update's tensors as read-only views, each proved against its checksum and against what the engine wants.

    Parts wider than they were published in are accepted (bfloat16 scales in a float32 engine: exact), narrower ones are
    not. Raises `SyncError`.
    """
    if update.format != format.name or update.contract_hash != contract_hash:
        raise SyncError(
            f"contract mismatch: published {update.format} with contract {update.contract_hash}, "
            f"the engine holds {format.name} with contract {contract_hash}"
        )
    _same_names("tensors", expected, update.tensors)
    for name, parts in expected.items():
        _same_names(f"parts of {name}", parts, update.tensors[name])
        for part, spec in parts.items():
            _fits(name, part, update.tensors[name][part], spec)
    return {
        name: {part: wire.verify(name, part, tensor) for part, tensor in parts.items()}
        for name, parts in update.tensors.items()
    }


def worst_tile(
    tiles: Iterable[Tile], served_columns: Callable[[str, np.ndarray], np.ndarray], tolerance: float
) -> float:
    """Largest |served - published| over the tiles, in units of each tensor's largest published |weight|.

    Raises `SyncError` naming the first tensor beyond the tolerance.
    """
    worst = 0.0
    for tile in tiles:
        served = served_columns(tile.tensor, tile.columns)
        if served.shape != tile.values.shape:
            raise SyncError(f"{tile.tensor}: a tile of shape {served.shape} is served, {tile.values.shape} published")
        scale = float(np.abs(tile.values).max()) or 1.0
        error = float(np.abs(served - tile.values).max()) / scale
        if not error <= tolerance:  # NaN is beyond any tolerance
            raise SyncError(
                f"{tile.tensor}: the engine serves other weights than were published, off by {error:.3g} of the largest"
            )
        worst = max(worst, error)
    return worst


def _same_names(what: str, expected: Iterable[str], given: Iterable[str]) -> None:
    missing, unexpected = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    if missing or unexpected:
        raise SyncError(f"{what} differ: missing {missing}, unexpected {unexpected}")


def _fits(name: str, part: str, tensor: WireTensor, spec: Spec) -> None:
    if tuple(tensor.shape) != spec.shape:
        raise SyncError(f"{name} ({part}) has shape {list(tensor.shape)}, the engine holds {list(spec.shape)}")
    dtype = getattr(torch, tensor.dtype, None)
    widens = (
        isinstance(dtype, torch.dtype)
        and dtype.is_floating_point
        and spec.dtype.is_floating_point
        and torch.promote_types(dtype, spec.dtype) == spec.dtype
    )
    if dtype != spec.dtype and not widens:
        raise SyncError(f"{name} ({part}) is {tensor.dtype}, the engine holds {spec.dtype}")
