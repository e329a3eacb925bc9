"""What of a learner goes to disk: the policy as anyone can load it, and what the next optimizer step needs.

    folder/policy/                          Hugging Face layout, in the model's dtype
    folder/learner/KIND-00000.safetensors   whole tensors named as in the model; KIND: masters (float32), exp_avg, …
    folder/learner/state.json               counters, and torch's RNG

Tensors are whole, so that world size and ZeRO stage may differ between save and load. No pickle. The caller makes the folder
atomic and syncs it to the disk.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from qarl.errors import CheckpointError
from qarl.trainer.ranks import deepspeed

MASTERS = "masters"
TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.jinja")
SHARD_BYTES = 4 * 2**30  # what rank 0 holds of a kind before it writes


class Shards:
    """Master weights and moments of every parameter, wherever DeepSpeed's stage keeps them. Every method is a collective."""

    def __init__(self, named: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, sharded: Any) -> None:
        """`optimizer`: torch's, whose state this is; `sharded`: what DeepSpeed made of it."""
        self.named, self.optimizer = dict(named), optimizer
        if hasattr(sharded, "single_partition_of_fp32_groups"):
            # ZeRO 1 and 2 link parameters to their moments once, when only the first group has any.
            for group, flat in zip(sharded.bit16_groups, sharded.single_partition_of_fp32_groups, strict=True):
                deepspeed.utils.lazy_init_hp_params_optimizer_state(group, flat, optimizer.state)

    def kinds(self) -> list[str]:
        """`masters`, then every kind of tensor that the optimizer keeps of a parameter, but for counts of steps."""
        held = (item for state in self.optimizer.state.values() for item in state.items())
        return [MASTERS, *sorted({kind for kind, values in held if torch.is_tensor(values) and values.ndim})]

    def read(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) one after another, the same on all ranks; float32, but for 8-bit moments."""
        for name, parameter in self.named.items():
            if _is_sharded(parameter):
                values = (
                    deepspeed.utils.safe_get_full_fp32_param(parameter)
                    if kind == MASTERS
                    else deepspeed.utils.safe_get_full_optimizer_state(parameter, kind)
                )
            else:
                values = parameter.data if kind == MASTERS else self.optimizer.state[parameter].get(kind)
            if values is not None:
                yield name, values

    def shape(self, name: str, kind: str) -> tuple[int, ...] | None:
        """Of the whole tensor; `None` where there is none."""
        parameter = self.named.get(name)
        if parameter is None:
            return None
        if kind == MASTERS or _is_sharded(parameter):
            return tuple(getattr(parameter, "ds_shape", parameter.shape))
        held = self.optimizer.state[parameter].get(kind)
        return None if held is None else tuple(held.shape)

    def write(self, name: str, kind: str, values: Tensor) -> None:
        """Cut a whole tensor up and put the pieces into their places, the weights that the forward reads included."""
        parameter = self.named[name]
        values = values.to(parameter.device)
        if kind == MASTERS:
            partitioned = hasattr(parameter, "ds_id")
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0) if partitioned else nullcontext():
                parameter.data.copy_(values)
            if _is_sharded(parameter):
                deepspeed.utils.safe_set_full_fp32_param(parameter, values)
        elif _is_sharded(parameter):
            deepspeed.utils.safe_set_full_optimizer_state(parameter, values, kind)
        else:
            self.optimizer.state[parameter][kind].copy_(values)


def save_state(folder: Path, shards: Shards, state: Mapping[str, Any], writes: bool) -> None:
    """Masters, moments and counters. All ranks gather; the one that `writes`, writes. Raises `OSError` where it cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = dict.fromkeys(shards.kinds(), 0)
    for kind in counts:
        for number, tensors in enumerate(_by_size(shards.read(kind), keep=writes)):
            with _disk():
                save_file(tensors, folder / f"{kind}-{number:05d}.safetensors")
            counts[kind] += len(tensors)
    if writes:
        rng = torch.get_rng_state().numpy().tobytes().hex()
        (folder / "state.json").write_text(json.dumps({**state, "tensors": counts, "torch_rng": rng}, indent=1))


def load_state(folder: Path, shards: Shards, optimizer: str) -> dict[str, Any]:
    """The inverse; the optimizer's state must exist already. Returns the counters. Raises `CheckpointError`."""
    try:
        state = json.loads((folder / "state.json").read_text())
        files = sorted(folder.glob("*.safetensors"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: state.json cannot be read: {error}") from error
    if state["optimizer"] != optimizer:
        raise CheckpointError(
            f"{folder} was made with learner.optimizer.name={state['optimizer']!r}, this run has {optimizer!r}"
        )
    counts = dict.fromkeys(state["tensors"], 0)
    for file in files:
        kind = file.name.rpartition("-")[0]
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                values = tensors.get_tensor(name)
                _check_fits(file, name, values, shards.shape(name, kind))
                shards.write(name, kind, values)
                counts[kind] = counts.get(kind, 0) + 1
    if counts != state["tensors"] or counts[MASTERS] != len(shards.named):
        raise CheckpointError(f"{folder} holds {counts} tensors, {state['tensors']} were saved of {len(shards.named)}")
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state.pop("torch_rng")), dtype=torch.uint8))
    return state


def save_policy(
    folder: Path, model: PreTrainedModel, weights: dict[str, Tensor], source: Path | str, revision: str | None = None
) -> None:
    """A folder that transformers and vLLM load: `weights` whole, in the model's dtype; the tokenizer from `source`, a folder or a
    hub name at `revision`."""
    folder.mkdir(parents=True, exist_ok=True)
    with _disk():
        model.save_pretrained(folder, state_dict=weights)
    if not Path(source).is_dir():
        AutoTokenizer.from_pretrained(source, revision=revision).save_pretrained(folder)
        return
    for pattern in TOKENIZER:
        for file in Path(source).glob(pattern):
            shutil.copyfile(file, folder / file.name)


@contextmanager
def _disk() -> Iterator[None]:
    """A disk that refuses raises `OSError`, also below safetensors, whose own error is none: the caller would not know it."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _is_sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _by_size(tensors: Iterable[tuple[str, Tensor]], keep: bool) -> Iterator[dict[str, Tensor]]:
    """Batches of up to SHARD_BYTES, on the CPU; without `keep` everything is only iterated."""
    batch: dict[str, Tensor] = {}
    size = 0
    for name, values in tensors:
        if not keep:
            continue
        if batch and size + values.nbytes > SHARD_BYTES:
            yield batch
            batch, size = {}, 0
        batch[name] = values.detach().cpu().contiguous().clone()
        size += values.nbytes
    if batch:
        yield batch


def _check_fits(file: Path, name: str, values: Tensor, shape: tuple[int, ...] | None) -> None:
    if shape != tuple(values.shape):
        raise CheckpointError(f"{file}: {name} is {list(values.shape)}, the model's is {shape and list(shape)}")
