"""Where published tensors live in a running vLLM model: under which module, in which parameter, of which shape.

vLLM rewrites weights after loading (it repacks them for its kernels and drops the originals), and keeps a record of what each
layer looked like before: published tensors are those of the record. Everything here runs in the worker's process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from qarl.errors import EngineError
from qarl.formats import QuantFormat
from qarl.wire import Spec, Specs

#: prefix of a packed experts' parameter -> the leaf of its fused name
_EXPERTS = {"w13_": "w13", "w2_": "w2"}
#: Parameters that vLLM makes and checkpoints do not fill, or that say what the shapes say already.
_NOT_PUBLISHED = ("weight_shape", "weight_g_idx", "g_idx", "g_idx_sort_indices")
_GRIDS: dict[torch.dtype, Literal["int8", "e4m3", "int4"]] = {
    torch.int8: "int8",
    torch.float8_e4m3fn: "e4m3",
    torch.int32: "int4",
}


@dataclass(frozen=True)
class Slot:
    """Where one published tensor lives in the model."""

    name: str
    """Fused name."""
    module: nn.Module
    params: Mapping[str, str]
    """Part -> the module's parameter."""

    def raw(self, part: str) -> Tensor:
        """The parameter as it is before vLLM rewrites it, without data."""
        param = self.params[part]
        before, _ = get_layerwise_info(self.module).restore_metadata
        return before[param] if param in before else getattr(self.module, param)

    def shape(self, part: str) -> tuple[int, ...]:
        """As published: embeddings without the rows vLLM pads them with, int4 experts with outputs before inputs."""
        raw = self.raw(part)
        if isinstance(self.module, VocabParallelEmbedding):
            return (int(self.module.org_vocab_size), *raw.shape[1:])
        return tuple(raw.mT.shape if is_transposed(raw) else raw.shape)

    @property
    def code(self) -> str:
        """The part that holds the codes of a quantized tensor."""
        return next(part for part in self.params if self.raw(part).dtype in _GRIDS)

    @property
    def n_inputs(self) -> int:
        """Input features of a quantized tensor."""
        return self.shape(self.code)[-1] * (8 if self.raw(self.code).dtype == torch.int32 else 1)

    @property
    def quantized(self) -> bool:
        return any(self.raw(part).dtype in _GRIDS for part in self.params)


def find_slots(model: nn.Module) -> dict[str, Slot]:
    """Fused name -> slot, of every tensor the model wants. A tied lm_head wants none of its own."""
    return {slot.name: slot for name, module in model.named_modules() for slot in _module_slots(name, module, model)}


def expected(slots: Mapping[str, Slot]) -> Specs:
    """What the model wants of each tensor."""
    return {
        slot.name: {part: Spec(slot.raw(part).dtype, slot.shape(part)) for part in slot.params}
        for slot in slots.values()
    }


def contract_hash(slots: Mapping[str, Slot], format: QuantFormat) -> str:
    """The contract of what the model really holds: its quantized tensors, their shapes, grid and group.

    Raises `EngineError` for a model that holds two grids.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    grids: set[tuple[Literal["bf16", "int8", "e4m3", "int4"], int | None]] = set()
    for slot in slots.values():
        if slot.quantized:
            grid, n_inputs = _GRIDS[slot.raw(slot.code).dtype], slot.n_inputs
            shapes[slot.name] = (*slot.shape(slot.code)[:-1], n_inputs)
            groups = slot.shape("weight_scale")[-1]
            grids.add((grid, None if groups == 1 and not format.group else n_inputs // groups))
    if len(grids) > 1:
        raise EngineError(f"the engine's model holds several grids: {sorted(map(str, grids))}")
    weight, group = grids.pop() if grids else ("bf16", None)
    return replace(format, weight=weight, group=group).contract_hash(shapes)


def is_transposed(raw: Tensor) -> bool:
    """vLLM's mark on parameters of experts that hold [E, K, N] what checkpoints hold as [E, N, K]."""
    return bool(getattr(raw, "is_transposed", False)) and raw.ndim == 3


def _module_slots(name: str, module: nn.Module, model: nn.Module) -> Iterator[Slot]:
    before, _ = get_layerwise_info(module).restore_metadata
    if isinstance(module, ParallelLMHead) and is_tied(module, model):
        return
    if any(param.startswith("w13_") for param in before):
        experts = name.removesuffix(".routed_experts")
        for prefix, leaf in _EXPERTS.items():
            parts = {p.removeprefix(prefix): p for p in before if p.startswith(prefix)}
            yield Slot(f"{experts}.{leaf}", module, {k: v for k, v in parts.items() if k not in _NOT_PUBLISHED})
        return
    # `scheme` and friends of an attention layer (KV-cache scales) are not weights of the policy.
    if before and (isinstance(module, LinearBase | VocabParallelEmbedding) or set(before) == {"weight"}):
        yield Slot(name, module, {p: p for p in before if p not in (*_NOT_PUBLISHED, "bias")})
        if isinstance(getattr(module, "bias", None), Tensor):
            yield Slot(f"{name}.bias", module, {"bias": "bias"})


def is_tied(head: ParallelLMHead, model: nn.Module) -> bool:
    return any(
        other.weight is head.weight
        for other in model.modules()
        if isinstance(other, VocabParallelEmbedding) and other is not head
    )
