"""What one rank of an engine takes of what is published, and that it arrived as it was published.

Ranks cut layers as Megatron does: qkv, gate and up, w13, embedding and lm_head by outputs, every stacked matrix for itself; the
products that follow them (o, down, w2) by inputs, so that ranks sum what comes out; the rest is whole on every rank. All of a
version reaches every rank, which takes its part of the bytes that it proves to be the published ones.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qarl.kernels.checksum import pending
from qarl.records import Tile
from qarl.rollout import proof
from qarl.transfer import Delivery, Manifest, Tensors
from qarl.wire import Spec, named_sums

Range = tuple[int, int]
"""[first, last)."""


@dataclass(frozen=True)
class Cut:
    """A rank's part of a tensor [*, N, K], codes and scales alike; of a bias [N]."""

    n_outputs: int
    """N of the whole."""
    n_inputs: int
    """K of the whole."""
    outputs: tuple[Range, ...]
    """Of N, one after another."""
    inputs: Range
    """Of K."""

    @classmethod
    def whole(cls, n_outputs: int, n_inputs: int) -> Cut:
        return cls(n_outputs, n_inputs, ((0, n_outputs),), (0, n_inputs))

    @classmethod
    def by_outputs(cls, stack: Sequence[tuple[int, int]], n_inputs: int, rank: int, ranks: int) -> Cut:
        """Rank's share of each stacked matrix of (outputs, copies): that many neighbours hold the same share, as of key and value
        heads where there are fewer than ranks."""
        taken, first = [], 0
        for size, copies in stack:
            share = size * copies // ranks
            start = first + rank // copies * share
            taken.append((start, start + share))
            first += size
        return cls(first, n_inputs, tuple(taken), (0, n_inputs))

    @classmethod
    def by_inputs(cls, n_outputs: int, n_inputs: int, rank: int, ranks: int) -> Cut:
        share = n_inputs // ranks
        return cls(n_outputs, n_inputs, ((0, n_outputs),), (rank * share, (rank + 1) * share))

    def of(self, part: Tensor) -> Tensor:
        """The rank's share of one part: a view, or a copy where it is in pieces. What has one entry for all inputs, as scales of
        output channels, goes to every rank. Raises `ValueError` where the cut goes through an entry, such as a group's scale."""
        part = _take(part, max(part.ndim - 2, 0), self.outputs, self.n_outputs)
        if part.ndim > 1 and part.shape[-1] > 1:
            part = _take(part, part.ndim - 1, (self.inputs,), self.n_inputs)
        return part

    def spec(self, whole: Spec) -> Spec:
        return Spec.of(self.of(torch.empty(whole.shape, dtype=whole.dtype, device="meta")))

    def tile(self, tile: Tile) -> Tile | None:
        """The rank's share of a tile; `None` where its columns are another's."""
        first, last = self.inputs
        mine = (tile.columns >= first) & (tile.columns < last)
        if not mine.any():
            return None
        values = torch.from_numpy(tile.values[..., mine])
        rows = _take(values, values.ndim - 2, self.outputs, self.n_outputs)
        return replace(tile, columns=tile.columns[mine] - first, values=rows.numpy())


class Share:
    """A rank's share of a delivery, itself a delivery: of its part of each tensor, with checksums and tiles of that part.

    The checksums are taken here, from the bytes that arrived, once these were proved to be those that were published.
    """

    def __init__(self, whole: Delivery, cuts: Mapping[str, Cut]) -> None:
        """`cuts`: of the tensors that the engine knows; others pass as they are, to be refused by name."""
        self.version, self.format, self.contract_hash = whole.version, whole.format, whole.contract_hash
        self._whole, self._cuts = whole, cuts
        self.specs = {
            name: {part: cuts[name].spec(spec) for part, spec in parts.items()} if name in cuts else dict(parts)
            for name, parts in whole.specs.items()
        }
        self._arrived: Tensors = {}
        self._mine: Tensors = {}

    def buckets(self) -> Generator[Tensors, None, None]:
        with closing(self._whole.buckets()) as buckets:
            for tensors in buckets:
                mine = {n: {p: self._cuts[n].of(v) for p, v in parts.items()} for n, parts in tensors.items()}
                self._arrived |= _sums(tensors)
                self._mine |= _sums(mine)
                yield mine

    def manifest(self) -> Manifest:
        """Raises `SyncError` where something arrived changed."""
        published = self._whole.manifest()
        proof.check_sums(published.checksums, _collected(self._arrived), ())
        tiles = (self._cuts[tile.tensor].tile(tile) for tile in published.tiles)
        return Manifest(_collected(self._mine), tuple(tile for tile in tiles if tile is not None))

    def abandon(self) -> None:
        self._whole.abandon()


def _take(tensor: Tensor, axis: int, ranges: Iterable[Range], whole: int) -> Tensor:
    """`ranges` of an axis whose entries each stand for several of `whole`."""
    pieces = []
    for first, last in ranges:
        if (first, last) == (0, whole):
            return tensor
        n = tensor.shape[axis]
        if first * n % whole or last * n % whole:
            raise ValueError(f"{first} to {last} of {whole} cuts through one of the {n} entries that stand for them")
        pieces.append(tensor.narrow(axis, first * n // whole, (last - first) * n // whole))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)


def _sums(tensors: Tensors) -> Tensors:
    return {name: {part: pending(values) for part, values in parts.items()} for name, parts in tensors.items()}


def _collected(sums: Tensors) -> dict[str, dict[str, int]]:
    return named_sums(sums, torch.stack([one for parts in sums.values() for one in parts.values()]))
