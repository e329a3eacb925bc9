"""Publish: the policy as the learner computes with it, in the engine's fused layout.

Scales belong to one output channel, or to a group of its inputs, so parts are quantized as they stream in and stacked as
codes: the codes of q, k and v end to end are the codes of qkv. Only the codes of one fused tensor exist twice at a time.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from qarl.formats import QuantFormat
from qarl.fusion import FUSED, engine_name, fused_shapes
from qarl.kernels.dispatch import quantizer
from qarl.records import Tile, WeightUpdate, WireTensor
from qarl.wire import from_wire, to_wire

Codes = dict[str, Tensor]
TILE_COLUMNS = 4


def make_update(
    parameters: Iterable[tuple[str, Tensor]],
    format: QuantFormat,
    version: int,
    n_tiles: int = 0,
) -> WeightUpdate:
    """Codes, scales and kept tensors of every parameter, named as the engine names them.

    `parameters`: (name in the transformers model, tensor), each read once and not kept, so that a generator may gather
    a parameter and release it again. Tied embeddings are given once, under the embedding's name. Raises `ConfigError` where
    a group does not divide.
    """
    seconds: dict[str, float] = defaultdict(float)
    waiting: dict[str, dict[int, Codes]] = defaultdict(dict)  # fused name -> place in the stack -> parts
    tensors: dict[str, dict[str, WireTensor]] = {}
    covered: dict[str, tuple[int, ...]] = {}
    clock = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[stage] += now - clock
        clock = now

    for name, tensor in parameters:
        lap("gather")
        fused, place = engine_name(name)
        shape = tuple(tensor.shape)
        if format.covers(name, shape):
            format.check_shape(name, shape)
            covered[name] = shape
            waiting[fused][place] = quantizer(format.name, tensor.device.type).quantize(tensor.detach(), format.group)
        else:
            waiting[fused][place] = {_kept_part(name): tensor.detach().clone()}
        lap("quantize")
        if len(waiting[fused]) == _n_parts(fused):
            tensors[fused] = {part: to_wire(values) for part, values in _stack(waiting.pop(fused)).items()}
            lap("pack")
    if waiting:
        raise ValueError(f"parts of {sorted(waiting)} are missing: their parameters were not given")
    shapes = fused_shapes(covered)
    tiles = make_tiles(tensors, shapes, format, version, n_tiles)
    lap("pack")
    return WeightUpdate(version, format.name, format.contract_hash(shapes), tensors, tiles, dict(seconds))


def make_tiles(
    tensors: dict[str, dict[str, WireTensor]],
    shapes: dict[str, tuple[int, ...]],
    format: QuantFormat,
    version: int,
    n_tiles: int,
) -> tuple[Tile, ...]:
    """A few dequantized columns of `n_tiles` covered tensors: others each version, the same for the same version."""
    names = sorted(shapes)
    chosen = [names[(version * n_tiles + i) % len(names)] for i in range(min(n_tiles, len(names)))]
    tiles = []
    for name in chosen:
        codes = {part: from_wire(wire) for part, wire in tensors[name].items()}
        weight = quantizer(format.name, "cpu").dequantize(codes, format.group, torch.float32)
        n_features = weight.shape[-1]
        columns = torch.arange(TILE_COLUMNS) * (n_features // TILE_COLUMNS) + version % max(
            n_features // TILE_COLUMNS, 1
        )
        tiles.append(Tile(name, columns.numpy(), weight[..., columns].float().cpu().numpy()))
    return tuple(tiles)


def _n_parts(fused: str) -> int:
    """How many parameters the engine stacks into this tensor. `fused`: with its suffix, if any (`….qkv_proj.bias`)."""
    leaf = fused.removesuffix(".bias").rpartition(".")[2]
    return len(FUSED.get(leaf, ("itself",)))


def _kept_part(parameter: str) -> str:
    return "bias" if parameter.endswith(".bias") else "weight"


def _stack(parts: dict[int, Codes]) -> Codes:
    """Parts end to end along the output features: the last dimension but one, or the only one of a bias."""
    ordered = [parts[place] for place in sorted(parts)]
    if len(ordered) == 1:
        return ordered[0]
    return {
        name: torch.cat([codes[name] for codes in ordered], dim=-2 if ordered[0][name].ndim > 1 else 0)
        for name in ordered[0]
    }
