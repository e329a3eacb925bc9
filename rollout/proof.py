"""The proof of a weight sync, the engine's half: what arrived is what was published, and what is served is what arrived.

Four stages, each naming the tensor that fails: the contract (both sides mean the same grids and the same tensors), names, shapes
and dtypes, before anything is loaded; then checksums of every part, as it is served where the engine knows its layout (on a GPU),
else as it arrived, and a few dequantized columns read back through the live layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from qarl.errors import SyncError
from qarl.formats import QuantFormat
from qarl.records import Tile
from qarl.transfer import Delivery
from qarl.wire import Spec, Specs


def check_contract(delivery: Delivery, expected: Specs, format: QuantFormat, contract_hash: str) -> None:
    """Raise `SyncError` unless what is coming is what the engine wants, by its name and by its shape.

    Parts wider than they were published in are accepted (bfloat16 scales in a float32 engine: exact), narrower ones are not.
    """
    if delivery.format != format.name or delivery.contract_hash != contract_hash:
        raise SyncError(
            f"contract mismatch: published {delivery.format} with contract {delivery.contract_hash}, "
            f"the engine holds {format.name} with contract {contract_hash}"
        )
    _same_names("tensors", expected, delivery.specs)
    for name, parts in expected.items():
        _same_names(f"parts of {name}", parts, delivery.specs[name])
        for part, spec in parts.items():
            _fits(name, part, delivery.specs[name][part], spec)


def check_sums(
    published: Mapping[str, Mapping[str, int]], held: Mapping[str, Mapping[str, int]], read_back: Iterable[str]
) -> None:
    """Raise `SyncError` naming the first part whose checksum is not the published one.

    `held`: of every part as the engine holds it. `read_back`: names of tensors whose checksums are of what is served, not of what
    arrived.
    """
    _same_names("tensors", published, held)
    if published == held:
        return  # most of the time, and a thousand parts are not looked at one by one
    served = set(read_back)
    for name, parts in published.items():
        _same_names(f"parts of {name}", parts, held[name])
        for part, expected in parts.items():
            found = held[name][part]
            if found != expected:
                what = "is not served as it was published" if name in served else "was changed on the way"
                raise SyncError(f"{name} ({part}) {what}: checksum {found:#x}, published {expected:#x}")


def worst_tile(tiles: Sequence[Tile], served_columns: Callable[[str, np.ndarray], Tensor], tolerance: float) -> float:
    """Largest |served - published| over the tiles, in units of the largest published |weight| of each.

    Raises `SyncError` naming the first tensor beyond the tolerance.
    """
    errors = [_off(tile, served_columns(tile.tensor, tile.columns)) for tile in tiles]
    worst = 0.0
    for tile, error in zip(tiles, torch.stack(errors).tolist() if errors else [], strict=True):
        if not error <= tolerance:  # NaN is beyond any tolerance
            raise SyncError(
                f"{tile.tensor}: the engine serves other weights than were published, off by {error:.3g} of the largest of the "
                "columns compared"
            )
        worst = max(worst, error)
    return worst


def _off(tile: Tile, served: Tensor) -> Tensor:
    """[], where `served` lies: nothing waits for it until all tiles are under way."""
    if served.shape != tile.values.shape:
        raise SyncError(
            f"{tile.tensor}: a tile of shape {list(served.shape)} is served, {list(tile.values.shape)} published"
        )
    published = torch.tensor(tile.values, device=served.device)
    scale = published.abs().max()
    return (served - published).abs().max() / scale.where(scale > 0, 1)


def _same_names(what: str, expected: Iterable[str], given: Iterable[str]) -> None:
    missing, unexpected = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    if missing or unexpected:
        raise SyncError(f"{what} differ: missing {missing}, unexpected {unexpected}")


def _fits(name: str, part: str, published: Spec, wanted: Spec) -> None:
    if published.shape != wanted.shape:
        raise SyncError(f"{name} ({part}) has shape {list(published.shape)}, the engine holds {list(wanted.shape)}")
    widens = (
        published.dtype.is_floating_point
        and wanted.dtype.is_floating_point
        and torch.promote_types(published.dtype, wanted.dtype) == wanted.dtype
    )
    if published.dtype != wanted.dtype and not widens:
        raise SyncError(f"{name} ({part}) is {_name(published.dtype)}, the engine holds {_name(wanted.dtype)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
