"""New weights for a running vLLM model: what its own loader does when it starts, layer by layer, while it runs.

vLLM rewrites weights after loading (it repacks them for its kernels and drops the originals), and keeps a record of what
each layer looked like before. A refill makes the layer's raw tensors anew from that record, copies the published codes
into them, and runs the layer's own `process_weights_after_loading` again. On a GPU the results go back into the storage
that CUDA graphs hold the address of.

Everything here runs in the worker's process and takes the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor
from vllm.model_executor.model_loader.reload.sanitize import restore_layer_refs

from qarl.errors import EngineError
from qarl.formats import QuantFormat
from qarl.rollout.proof import Parts, Spec

#: prefix of a packed experts' parameter -> the leaf of its fused name
_EXPERTS = {"w13_": "w13", "w2_": "w2"}
#: Parameters that vLLM makes and checkpoints do not fill, or that say what the shapes say already.
_NOT_PUBLISHED = ("weight_shape", "weight_g_idx", "g_idx")
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

    @property
    def quantized(self) -> bool:
        return any(self.raw(part).dtype in _GRIDS for part in self.params)


def slots(model: nn.Module) -> dict[str, Slot]:
    """Fused name -> slot, of every tensor the model wants. A tied lm_head wants none of its own."""
    return {slot.name: slot for name, module in model.named_modules() for slot in _module_slots(name, module, model)}


def expected(model: nn.Module) -> dict[str, Parts]:
    """What the model wants of each tensor. Embeddings are padded by vLLM; published ones are not."""
    return {
        slot.name: {part: Spec(slot.raw(part).dtype, _published_shape(slot, part)) for part in slot.params}
        for slot in slots(model).values()
    }


def contract_hash(model: nn.Module, format: QuantFormat) -> str:
    """The contract of what the model really holds: its quantized tensors, their shapes, grid and group.

    Raises `EngineError` for a model that holds two grids.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    grids: set[tuple[Literal["bf16", "int8", "e4m3", "int4"], int | None]] = set()
    for slot in slots(model).values():
        if slot.quantized:
            code = next(slot.raw(part) for part in slot.params if slot.raw(part).dtype in _GRIDS)
            packed = 8 if code.dtype == torch.int32 else 1
            shapes[slot.name] = (*code.shape[:-1], code.shape[-1] * packed)
            groups = slot.raw("weight_scale").shape[-1]
            grids.add(
                (_GRIDS[code.dtype], None if groups == 1 and not format.group else shapes[slot.name][-1] // groups)
            )
    if len(grids) > 1:
        raise EngineError(f"the engine's model holds several grids: {sorted(map(str, grids))}")
    weight, group = grids.pop() if grids else ("bf16", None)
    return replace(format, weight=weight, group=group).contract_hash(shapes)


@torch.no_grad()
def load(model: nn.Module, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Serve these tensors (as `expected`) from now on."""
    found = slots(model)
    by_module: dict[nn.Module, list[Slot]] = {}
    for slot in found.values():
        by_module.setdefault(slot.module, []).append(slot)
    for module, its_slots in by_module.items():
        _load_module(module, its_slots, tensors)
    head = getattr(model, "lm_head", None)
    if isinstance(head, ParallelLMHead) and _is_tied(head, model):
        _process(head)  # on a CPU it multiplies by a repacked copy of the embedding


@torch.no_grad()
def served_columns(model: nn.Module, name: str, columns: np.ndarray) -> np.ndarray:
    """float32 [N, C]: the columns of a quantized matrix, by sending one-hot inputs through the live layer.

    A one-hot row quantizes without error (one code at the largest value), and whatever layout the kernel made of the
    weights is what answers.
    """
    module: Any = slots(model)[name].module
    norm = next(p for p in model.parameters() if p.is_floating_point() and p.ndim == 1)
    one_hot = torch.zeros(len(columns), int(module.input_size_per_partition), dtype=norm.dtype, device=norm.device)
    one_hot[torch.arange(len(columns)), torch.from_numpy(columns).to(norm.device)] = 1
    return module.quant_method.apply(module, one_hot, None).T.float().cpu().numpy()


def _module_slots(name: str, module: nn.Module, model: nn.Module) -> Iterator[Slot]:
    before, _ = get_layerwise_info(module).restore_metadata
    if isinstance(module, ParallelLMHead) and _is_tied(module, model):
        return
    if any(param.startswith("w13_") for param in before):
        experts = name.removesuffix(".routed_experts")
        for prefix, leaf in _EXPERTS.items():
            parts = {p.removeprefix(prefix): p for p in before if p.startswith(prefix)}
            yield Slot(f"{experts}.{leaf}", module, {k: v for k, v in parts.items() if k not in _NOT_PUBLISHED})
        return
    # `scheme` and friends of an attention layer (KV-cache scales) are not weights of the policy.
    if before and (isinstance(module, LinearBase | VocabParallelEmbedding) or set(before) == {"weight"}):
        yield Slot(name, module, {param: param for param in before if param not in _NOT_PUBLISHED})
        if isinstance(getattr(module, "bias", None), Tensor):
            yield Slot(f"{name}.bias", module, {"bias": "bias"})


def _is_tied(head: ParallelLMHead, model: nn.Module) -> bool:
    return any(
        other.weight is head.weight
        for other in model.modules()
        if isinstance(other, VocabParallelEmbedding) and other is not head
    )


def _published_shape(slot: Slot, part: str) -> tuple[int, ...]:
    shape = tuple(slot.raw(part).shape)
    if isinstance(slot.module, VocabParallelEmbedding):
        return (int(slot.module.org_vocab_size), *shape[1:])
    return shape


def _load_module(module: nn.Module, its_slots: list[Slot], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    in_place = not isinstance(getattr(module, "quant_method", None), QuantizeMethodBase)
    kernel = {n: p for n, p in module.named_parameters(recurse=False) if p.is_cuda}
    for slot in its_slots:
        for part, param in slot.params.items():
            given = tensors[slot.name][part]
            if in_place or param == "bias" or isinstance(module, VocabParallelEmbedding):
                # Shared with a tied lm_head, or read as it is. The padding of an embedding stays as it was.
                getattr(module, param).data[: len(given)].copy_(given)
            else:
                if hasattr(module, param):  # perhaps as a plain attribute, whose name no parameter could take
                    setattr(module, param, None)
                module.register_parameter(param, _fresh(slot, part, given, module))
    _process(module)
    _keep_addresses(module, kernel)


def _fresh(slot: Slot, part: str, given: Tensor, module: nn.Module) -> nn.Parameter:
    """The raw parameter, class and attributes as vLLM made it, holding a copy of the given tensor."""
    template = restore_layer_refs(slot.raw(part), module)
    with torch.device(get_layerwise_info(module).restore_device):
        param: Any = materialize_meta_tensor(template)
    param.data.copy_(given)
    return param


def _process(module: nn.Module) -> None:
    method = getattr(module, "quant_method", None)
    if isinstance(method, QuantizeMethodBase):
        module.__dict__.pop("_already_called_process_weights_after_loading", None)
        if any(not p.is_cuda for p in module.parameters(recurse=False)) and hasattr(method, "moe_kernel"):
            method.moe_kernel = (
                None  # with one in place, vLLM takes experts for repacked already, which on a CPU is wrong
            )
        method.process_weights_after_loading(module)


def _keep_addresses(module: nn.Module, kernel: Mapping[str, nn.Parameter]) -> None:
    """Move what was made anew into the storage that was served before: CUDA graphs read that address."""
    for name, before in kernel.items():
        after = getattr(module, name)
        if after.data_ptr() != before.data_ptr():
            if after.shape != before.shape or after.dtype != before.dtype or after.stride() != before.stride():
                raise EngineError(f"{name} of {type(module).__name__} changed its layout over a refill")
            before.data.copy_(after.data)
            setattr(module, name, before)
