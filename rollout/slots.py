"""Where published tensors live in a running vLLM model: under which module, in which parameter, of which shape.

vLLM rewrites weights after loading (it repacks them for its kernels and drops the originals), and keeps a record of what each
layer looked like before: published tensors are those of the record. Everything here runs in the worker's process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from qarl.errors import EngineError
from qarl.formats import QuantFormat
from qarl.rollout.shards import Cut
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
        """As published, of a rank its share: embeddings without the rows vLLM pads them with, int4 experts with outputs before
        inputs."""
        raw = self.raw(part)
        if isinstance(self.module, VocabParallelEmbedding):
            return (self.module.shard_indices.num_org_elements, *raw.shape[1:])
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

    @property
    def cut(self) -> Cut:
        """What this rank holds of it, as vLLM's own layer says."""
        shape = self.shape(self.code if self.quantized else next(iter(self.params)))
        n_outputs, n_inputs = (*shape, 1) if len(shape) == 1 else shape[-2:]
        return _cut(self.name, self.module, n_outputs, self.n_inputs if self.quantized else n_inputs)


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
    """The contract of what the model really holds, all ranks of it: its quantized tensors, their shapes, grid and group.

    Raises `EngineError` for a model that holds two grids.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    grids: set[tuple[Literal["bf16", "int8", "e4m3", "int4"], int | None]] = set()
    for slot in slots.values():
        if slot.quantized:
            grid, cut = _GRIDS[slot.raw(slot.code).dtype], slot.cut
            shapes[slot.name] = (*slot.shape(slot.code)[:-2], cut.n_outputs, cut.n_inputs)
            groups = slot.shape("weight_scale")[-1]
            grids.add((grid, None if groups == 1 and not format.group else slot.n_inputs // groups))
    if len(grids) > 1:
        raise EngineError(f"the engine's model holds several grids: {sorted(map(str, grids))}")
    weight, group = grids.pop() if grids else ("bf16", None)
    return replace(format, weight=weight, group=group).contract_hash(shapes)


def _cut(name: str, module: Any, n_outputs: int, n_inputs: int) -> Cut:
    """`n_outputs`, `n_inputs`: of what this rank holds."""
    if isinstance(module, VocabParallelEmbedding):
        mine = module.shard_indices
        rows = (mine.org_vocab_start_index, mine.org_vocab_end_index)
        return Cut(module.org_vocab_size, n_inputs, (rows,), (0, n_inputs))
    if isinstance(module, LinearBase):
        rank, ranks = module.tp_rank, module.tp_size
        if isinstance(module, RowParallelLinear):
            return Cut.by_inputs(n_outputs, module.input_size, rank, ranks)
        if isinstance(module, QKVParallelLinear):
            q, k, v = module.output_sizes  # of key and value heads, all copies
            copies = module.num_kv_head_replicas
            return Cut.by_outputs([(q, 1), (k // copies, copies), (v // copies, copies)], n_inputs, rank, ranks)
        if isinstance(module, MergedColumnParallelLinear):
            return Cut.by_outputs([(size, 1) for size in module.output_sizes], n_inputs, rank, ranks)
        if isinstance(module, ColumnParallelLinear):
            return Cut.by_outputs([(module.output_size, 1)], n_inputs, rank, ranks)
    elif name.endswith((".w13", ".w2")):
        rank, ranks = module.moe_config.tp_rank, module.moe_config.tp_size
        if name.endswith(".w2"):
            return Cut.by_inputs(n_outputs, n_inputs * ranks, rank, ranks)
        return Cut.by_outputs([(n_outputs // 2 * ranks, 1)] * 2, n_inputs, rank, ranks)
    return Cut.whole(n_outputs, n_inputs)


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
