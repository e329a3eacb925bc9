"""Publish: the policy as the learner computes with it, in the engine's fused layout, into whatever takes it on.

Scales belong to one output channel, or to a group of its inputs, so the codes of q, k and v are quantized one by one into their
rows of qkv: the codes of the parts end to end are the codes of the stack. A learner that keeps codes for its forward publishes
those very codes; else a weight is read once, where it lies. What is written is final: room in a transfer's buffer
(`qarl.transfer.Outlet`), or a tensor of its own (`HostRoom`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from qarl.formats import QuantFormat, Shape
from qarl.fusion import covered_shapes, engine_name, fuse
from qarl.kernels.checksum import pending
from qarl.kernels.dispatch import quantizer
from qarl.records import Tile, WeightUpdate, WireTensor
from qarl.stages import Stages
from qarl.transfer import Manifest
from qarl.wire import Specs, named_sums, published_specs, to_wire

Codes = dict[str, Tensor]
KeptCodes = Callable[[str, Tensor], Codes | None]
"""(name, weight) -> codes of the weight as it is, or `None` where they have to be made."""


class Room(Protocol):
    """What takes a policy on, tensor by tensor."""

    def room(self, name: str) -> Codes:
        """Where the parts of this fused tensor go."""

    def done(self, name: str) -> None:
        """They are all written, or queued to be."""

    def checksums(self) -> dict[str, dict[str, int]]:
        """Of all parts, by `kernels.checksum`."""


def publish(
    parameters: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, Shape],
    format: QuantFormat,
    version: int,
    n_tiles: int,
    into: Room,
    kept_codes: KeptCodes = lambda name, weight: None,
) -> tuple[Manifest, dict[str, float]]:
    """Write codes, scales and kept tensors of every parameter; returns their checksums and tiles, and seconds by stage.

    `parameters`: (name in the transformers model, tensor) of every name in `shapes`; each is read once and not kept, so that a
    generator may gather a parameter and release it again. Tied embeddings are given once, under the embedding's name.
    `kept_codes`: those that the learner computes with, where it keeps them. Raises what `into` raises.
    """
    stages = Stages()
    stacks = fuse(shapes)
    left = {fused: len(stack) for fused, stack in stacks.items()}
    first_row = {name: row for stack in stacks.values() for name, row in _first_rows(stack, shapes)}
    covered = covered_shapes(shapes, format)
    chosen = chosen_tiles(covered, version, n_tiles)
    tiles: list[tuple[str, Tensor, Tensor]] = []
    stream = iter(parameters)
    while True:
        with stages("gather"):
            name, tensor = next(stream, ("", None))
        if tensor is None:
            break
        fused, _ = engine_name(name)
        room = into.room(fused)
        with stages("quantize"):
            write(name, tensor.detach(), room, first_row[name], format, kept_codes)
        left[fused] -= 1
        if not left[fused]:
            with stages("pack"):
                if fused in chosen:
                    tiles.append((fused, *tile_of(room, covered[fused], format, version)))
                into.done(fused)
    if missing := sorted(fused for fused, parts in left.items() if parts):
        raise ValueError(f"parts of {missing} are missing: their parameters were not given")
    with stages("pack"):
        manifest = Manifest(into.checksums(), tuple(Tile(n, at.cpu().numpy(), w.cpu().numpy()) for n, at, w in tiles))
    return manifest, stages.seconds


def write(name: str, weight: Tensor, room: Codes, row: int, format: QuantFormat, kept_codes: KeptCodes) -> None:
    """One parameter into its rows, from `row` on, of the fused tensor's parts."""
    axis = max(weight.ndim - 2, 0)
    mine = {part: values.narrow(axis, row, weight.shape[axis]) for part, values in room.items()}
    if not format.covers(name, tuple(weight.shape)):
        (values,) = mine.values()
        values.copy_(weight)
    elif codes := kept_codes(name, weight):
        for part, values in mine.items():
            values.copy_(codes[part])
    else:
        quantizer(format.name, weight.device.type).quantize_into(weight, format.group, mine)


def chosen_tiles(covered: Mapping[str, Shape], version: int, n_tiles: int) -> set[str]:
    """Covered tensors to take tiles of: others each version, the same for the same version."""
    names = sorted(covered)
    return {names[(version * n_tiles + i) % len(names)] for i in range(min(n_tiles, len(names)))}


def tile_of(codes: Codes, shape: Shape, format: QuantFormat, version: int) -> tuple[Tensor, Tensor]:
    """int64 [1] and float32 [*, N, 1]: one column of the inputs, another each version, and the weights dequantized there."""
    device = next(iter(codes.values())).device
    columns = torch.tensor([version % shape[-1]], device=device)
    return columns, quantizer(format.name, device.type).columns(codes, format.group, columns)


class HostRoom:
    """Tensors of their own, as bytes in host memory once they are written."""

    def __init__(self, specs: Specs, device: torch.device) -> None:
        self._specs, self._device = specs, device
        self._open: dict[str, Codes] = {}
        self.tensors: dict[str, dict[str, WireTensor]] = {}
        self._sums: list[Tensor] = []

    def room(self, name: str) -> Codes:
        if name not in self._open:
            self._open[name] = {
                part: torch.empty(spec.shape, dtype=spec.dtype, device=self._device)
                for part, spec in self._specs[name].items()
            }
        return self._open[name]

    def done(self, name: str) -> None:
        parts = self._open.pop(name)
        self.tensors[name] = {part: to_wire(values) for part, values in parts.items()}
        self._sums += [pending(values) for values in parts.values()]

    def checksums(self) -> dict[str, dict[str, int]]:
        return named_sums(self.tensors, torch.stack(self._sums))


def make_update(
    parameters: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, Shape],
    format: QuantFormat,
    version: int,
    device: torch.device,
    dtype: torch.dtype,
    n_tiles: int = 0,
    kept_codes: KeptCodes = lambda name, weight: None,
) -> WeightUpdate:
    """The policy in host memory; see `publish`. `device`: where parameters lie; `dtype`: theirs."""
    host = HostRoom(published_specs(shapes, format, dtype), device)
    manifest, seconds = publish(parameters, shapes, format, version, n_tiles, host, kept_codes)
    contract = format.contract_hash(covered_shapes(shapes, format))
    return WeightUpdate(version, format.name, contract, host.tensors, manifest.checksums, manifest.tiles, seconds)


def model_update(model: nn.Module, format: QuantFormat, version: int, n_tiles: int = 0) -> WeightUpdate:
    """`make_update` of a model whose weights are whole, of one dtype and on one device."""
    weights = dict(model.named_parameters())
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    one = next(iter(weights.values()))
    return make_update(weights.items(), shapes, format, version, one.device, one.dtype, n_tiles)


def _first_rows(stack: Iterable[str], shapes: Mapping[str, Shape]) -> Iterator[tuple[str, int]]:
    """Where each parameter of a stack begins along the output features."""
    row = 0
    for name in stack:
        yield name, row
        row += shapes[name][max(len(shapes[name]) - 2, 0)]
