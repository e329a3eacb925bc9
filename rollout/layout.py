"""How vLLM's kernels on a GPU keep what is published, written and read in place.

Most keep a tensor as it is, or transposed; Marlin keeps int4 codes and their scales in an order of its own (kernels/marlin.py).
A home knows the live storage, whose address CUDA graphs hold, so that a refill needs no copy beside it. What is known here is
proved: an engine's first refill goes through vLLM's own processing, and is read back from the homes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from qarl.kernels import marlin, marlin_fused
from qarl.kernels.checksum import pending
from qarl.rollout.slots import Slot


class Home(Protocol):
    """One part of a published tensor in a running layer."""

    @property
    def live(self) -> Tensor:
        """What the layer's kernel reads."""

    def write(self, values: Tensor) -> None:
        """`values`: as published."""

    def pending(self) -> Tensor:
        """The pending checksum of what is stored, as it was published."""


@dataclass(frozen=True)
class Plain:
    """As published, but for strides."""

    live: Tensor

    def write(self, values: Tensor) -> None:
        self.live.copy_(values)

    def pending(self) -> Tensor:
        return pending(self.live)


@dataclass(frozen=True)
class MarlinCodes:
    live: Tensor
    """int32 [*, K/16, 2N]."""

    def write(self, values: Tensor) -> None:
        marlin_fused.pack(values.to(self.live.device), out=self.live)

    def pending(self) -> Tensor:
        return marlin_fused.pending_checksum(self.live)


@dataclass(frozen=True)
class MarlinScales:
    live: Tensor
    """bfloat16 [*, K/group, N]."""

    def write(self, values: Tensor) -> None:
        marlin.pack_scales(values.to(self.live.device), out=self.live)

    def pending(self) -> Tensor:
        return pending(marlin.unpack_scales(self.live))


def homes(slot: Slot) -> dict[str, Home] | None:
    """Part -> home, once vLLM processed the layer; `None` where it keeps the tensor in a way not known here (padded for its
    kernel, say)."""
    found: dict[str, Home] = {}
    for part, param in slot.params.items():
        home = _home(slot, part, getattr(slot.module, param).data)
        if home is None:
            return None
        found[part] = home
    return found


def _home(slot: Slot, part: str, live: Tensor) -> Home | None:
    shape = slot.shape(part)
    if isinstance(slot.module, VocabParallelEmbedding):
        live = live[: shape[0]]
    if _has_int4(slot.module):
        if part == "weight_packed":
            *experts, n, words = shape
            return MarlinCodes(live) if tuple(live.shape) == (*experts, words // 2, 2 * n) else None
        transposed = (*shape[:-2], shape[-1], shape[-2])
        return MarlinScales(live) if part == "weight_scale" and tuple(live.shape) == transposed else None
    if live.dtype != slot.raw(part).dtype:
        return None
    # A square weight has its shape both ways: the one that lies in memory as it was published is meant.
    views = [live, live.mT] if live.ndim > 1 else [live]
    return next((Plain(view) for view in views if tuple(view.shape) == shape and view.is_contiguous()), None)


def _has_int4(module: Any) -> bool:
    return any(param is not None and param.dtype == torch.int32 for param in module._parameters.values())
