"""A policy on disk in compressed-tensors layout: codes and scales module by module, as stock vLLM and transformers load them.

    model.layers.0.self_attn.q_proj.weight_packed        codes and scales named as the format's kernel names them
    model.layers.0.self_attn.q_proj.weight_scale
    model.layers.0.self_attn.q_proj.weight_shape         of int4 only, whose packing hides the shape
    model.layers.0.mlp.experts.7.gate_proj.weight_packed experts one by one, gate and up apart

Scales belong to one output channel, or to a group of its inputs, so the codes of one expert, or of q alone, are those that the
learner has for the stack. Tensors are read, quantized and written one after another: one shard is held at a time.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qarl.errors import ConfigError
from qarl.formats import Coverage, QuantFormat, Shape, coverage
from qarl.kernels.dispatch import quantizer

SHARD_BYTES = 4 * 2**30
INDEX = "model.safetensors.index.json"
#: What else a folder in Hugging Face layout holds: tokenizer, chat template, generation settings.
_COMPANIONS = (".json", ".jinja", ".txt", ".model")


def write_checkpoint(
    source: Path, out: Path, format: QuantFormat, config: Mapping[str, Any], shard_bytes: int = SHARD_BYTES
) -> Coverage:
    """Make the folder `out` from the folder `source` in Hugging Face layout. A reader finds all of it or nothing.

    `config`: what the format adds to `config.json`. Tensors that the format keeps stay in their dtype; `bf16` casts all of them.
    Raises `ConfigError` for a source that is none, or quantized already, and where a group does not divide.
    """
    settings = _read_config(source)
    if not format.quantizes:
        settings = {key: value for key, value in settings.items() if key != "torch_dtype"} | {"dtype": "bfloat16"}
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        shapes = _write_weights(source, draft, format, shard_bytes)
        (draft / "config.json").write_text(json.dumps(settings | dict(config), indent=2) + "\n")
        for file in source.iterdir():
            if file.suffix in _COMPANIONS and file.name not in ("config.json", INDEX):
                shutil.copyfile(file, draft / file.name)
        draft.chmod(0o755)  # mkdtemp's 0o700 would hide it from other users
        os.rename(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return coverage(format, shapes)


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in a folder's safetensors files, on the CPU, one after another."""
    index = folder / INDEX
    names = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    )
    for name in names:
        with safe_open(folder / name, framework="pt") as tensors:
            for key in tensors.keys():
                yield key, tensors.get_tensor(key)


def _read_config(source: Path) -> dict[str, Any]:
    if not (source / "config.json").is_file() or not any((source / n).is_file() for n in (INDEX, "model.safetensors")):
        raise ConfigError(f"model: {str(source)!r} is no folder with config.json and safetensors weights")
    settings = json.loads((source / "config.json").read_text())
    if "quantization_config" in settings:
        raise ConfigError(f"model: {str(source)!r} is quantized already")
    return settings


def _write_weights(source: Path, folder: Path, format: QuantFormat, shard_bytes: int) -> dict[str, Shape]:
    """Returns name -> shape of what was read, experts one by one."""
    shapes: dict[str, Shape] = {}
    shards: list[list[str]] = []  # names in each
    batch: dict[str, Tensor] = {}
    total = held = 0

    def flush() -> None:
        nonlocal batch, held
        if batch:
            save_file(batch, folder / f"{len(shards)}.draft", metadata={"format": "pt"})
            shards.append(list(batch))
        batch, held = {}, 0

    for stored, tensor in read_tensors(source):
        for name, matrix in _modules(stored, tensor):
            shapes[name] = tuple(matrix.shape)
            parts = _parts(name, matrix, format)
            size = sum(part.nbytes for part in parts.values())
            if held + size > shard_bytes:
                flush()
            batch |= parts
            held += size
            total += size
    flush()
    if len(shards) == 1:
        os.rename(folder / "0.draft", folder / "model.safetensors")
        return shapes
    where: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(folder / f"{i}.draft", folder / file)
        where |= dict.fromkeys(names, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1) + "\n")
    return shapes


def _modules(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A stored tensor as the loaders know it: packed experts [E, N, K] one by one, gate and up apart."""
    path, _, leaf = name.rpartition(".")
    if leaf not in ("gate_up_proj", "down_proj") or tensor.ndim != 3:
        yield name, tensor
        return
    for expert, matrix in enumerate(tensor):
        if leaf == "gate_up_proj":
            gate, up = matrix.chunk(2)
            yield f"{path}.{expert}.gate_proj.weight", gate
            yield f"{path}.{expert}.up_proj.weight", up
        else:
            yield f"{path}.{expert}.down_proj.weight", matrix


def _parts(name: str, tensor: Tensor, format: QuantFormat) -> dict[str, Tensor]:
    """What is written of one tensor, named in full."""
    shape = tuple(tensor.shape)
    if not format.covers(name, shape):
        return {name: (tensor if format.quantizes else tensor.to(torch.bfloat16)).contiguous()}
    format.check_shape(name, shape)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    codes = quantizer(format.name, device).quantize(tensor.to(device), format.group)
    if "weight_packed" in codes:
        codes = {**codes, "weight_shape": torch.tensor(shape)}
    module = name.removesuffix(".weight")
    return {f"{module}.{part}": values.cpu().contiguous() for part, values in codes.items()}
