"""New weights for a running vLLM model: what its own loader does when it starts, layer by layer, while it runs.

vLLM rewrites weights after loading (it repacks them for its kernels and drops the originals), and keeps a record of what
each layer looked like before. A refill makes the layer's raw tensors anew from that record, copies the published codes
into them, and runs the layer's own `process_weights_after_loading` again.

On a GPU it runs on a stand-in of the layer, and what comes out is copied into the tensors of the layer itself. CUDA graphs
read those, and what the layer's kernel object holds besides (a workspace of locks, strides, permutations): the stand-in
leaves every one of them at its address. On a CPU the layer itself is processed, since its kernel objects hold weights.

Everything here runs in the worker's process, with vLLM's configuration set, and takes the model.
"""

from __future__ import annotations

import copy
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

from qarl.errors import EngineError
from qarl.formats import QuantFormat
from qarl.rollout.proof import Parts, Spec

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
        return tuple(raw.mT.shape if _is_transposed(raw) else raw.shape)

    @property
    def quantized(self) -> bool:
        return any(self.raw(part).dtype in _GRIDS for part in self.params)


def slots(model: nn.Module) -> dict[str, Slot]:
    """Fused name -> slot, of every tensor the model wants. A tied lm_head wants none of its own."""
    return {slot.name: slot for name, module in model.named_modules() for slot in _module_slots(name, module, model)}


def expected(model: nn.Module) -> dict[str, Parts]:
    """What the model wants of each tensor."""
    return {
        slot.name: {part: Spec(slot.raw(part).dtype, slot.shape(part)) for part in slot.params}
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
            code = next(part for part in slot.params if slot.raw(part).dtype in _GRIDS)
            grid = _GRIDS[slot.raw(code).dtype]
            *rows, n_inputs = slot.shape(code)
            n_inputs *= 8 if grid == "int4" else 1
            shapes[slot.name] = (*rows, n_inputs)
            groups = slot.shape("weight_scale")[-1]
            grids.add((grid, None if groups == 1 and not format.group else n_inputs // groups))
    if len(grids) > 1:
        raise EngineError(f"the engine's model holds several grids: {sorted(map(str, grids))}")
    weight, group = grids.pop() if grids else ("bf16", None)
    return replace(format, weight=weight, group=group).contract_hash(shapes)


@torch.no_grad()
def load(model: nn.Module, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Serve these tensors (as `expected`) from now on. Raises `EngineError` where a layer changes its layout."""
    _wait()  # for a batch still under way: vLLM has a stream of its own, which another thread would not use
    by_module: dict[nn.Module, list[Slot]] = {}
    for slot in slots(model).values():
        by_module.setdefault(slot.module, []).append(slot)
    for module, its_slots in by_module.items():
        given = {param: (slot, part) for slot in its_slots for part, param in slot.params.items()}
        method = getattr(module, "quant_method", None)
        if not isinstance(method, QuantizeMethodBase) or isinstance(module, VocabParallelEmbedding):
            # Read as it is, or shared with a tied lm_head. The padding of an embedding stays as it was.
            for param, (slot, part) in given.items():
                values = tensors[slot.name][part]
                getattr(module, param).data[: len(values)].copy_(values)
            _process_on_cpu(module)
            continue
        raw = {param: _raw(slot, part, tensors[slot.name][part]) for param, (slot, part) in given.items()}
        if all(param.is_cuda for param in raw.values()):
            _load_on_gpu(module, raw)
        else:
            _load_on_cpu(module, raw)
    head = getattr(model, "lm_head", None)
    if isinstance(head, ParallelLMHead) and _is_tied(head, model):
        _process_on_cpu(head)  # it multiplies by a repacked copy of the embedding
    _wait()


@torch.inference_mode()  # as vLLM runs its layers: experts write into a workspace that was made so
def served_columns(model: nn.Module, name: str, columns: np.ndarray) -> np.ndarray:
    """float32 [..., N, C]: the columns of a quantized weight, by sending one-hot inputs through the live layer.

    A one-hot row quantizes without error (one code at the largest value), and whatever layout the kernel made of the
    weights is what answers.
    """
    every = slots(model)
    slot = every[name]
    module: Any = slot.module
    kept = next(other for other in every.values() if not other.quantized)  # of the dtype of activations
    like: Any = getattr(kept.module, *kept.params.values())
    code = next(part for part in slot.params if slot.raw(part).dtype in _GRIDS)
    n_inputs = slot.shape(code)[-1] * (8 if slot.raw(code).dtype == torch.int32 else 1)
    one_hot = torch.zeros(len(columns), n_inputs, dtype=like.dtype, device=like.device)
    one_hot.scatter_(1, torch.from_numpy(columns).to(like.device)[:, None], 1)
    if isinstance(module, LinearBase):
        served = module.quant_method.apply(module, one_hot, None)
    else:
        served = _experts_apply(module, slot, one_hot)
    return served.mT.float().cpu().numpy()


def _experts_apply(module: Any, slot: Slot, one_hot: Tensor) -> Tensor:
    """[E, C, N]: every expert's w13 or w2 times one_hot [C, K], through the layer's own kernel.

    The kernel computes w2 · act(w13 · x). With `act` replaced for this one call, what reaches it is w13's product, and what
    leaves it is w2's input. Each row goes to one expert with weight 1.
    """
    kernel = getattr(module.quant_method, "moe_kernel", None)
    if kernel is None:
        raise EngineError(f"{slot.name}: vLLM's kernel here has no step between its two products to look at")
    n_experts, (n_columns, device) = module.local_num_experts, (len(one_hot), one_hot.device)
    rows = one_hot.repeat(n_experts, 1)
    experts = torch.arange(n_experts, dtype=torch.int32, device=device).repeat_interleave(n_columns)[:, None]
    first = slot.name.endswith(".w13")
    hidden = rows if first else rows.new_zeros(len(rows), module.hidden_size)
    reached: list[Tensor] = []

    def activation(_kind: Any, output: Tensor, input: Tensor, **_: Any) -> None:
        gate_up = input.unflatten(-1, (2, -1))[..., : slot.shape(next(iter(slot.params)))[-2] // 2]
        reached.append(gate_up.flatten(-2).clone())  # without what Marlin pads each half with
        output.zero_()
        if not first:
            output[:, : rows.shape[1]] = rows

    kernel.fused_experts.activation = activation
    try:
        weights = torch.ones(len(rows), 1, dtype=torch.float32, device=device)
        served = module.quant_method.apply(module, hidden, weights, experts, None, None)
    finally:
        del kernel.fused_experts.activation
    if len(reached) != 1:
        raise EngineError(f"{slot.name}: vLLM's kernel did not come by its activation")
    return (reached[0] if first else served).unflatten(0, (n_experts, n_columns))


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
        yield Slot(name, module, {p: p for p in before if p not in (*_NOT_PUBLISHED, "bias")})
        if isinstance(getattr(module, "bias", None), Tensor):
            yield Slot(f"{name}.bias", module, {"bias": "bias"})


def _is_tied(head: ParallelLMHead, model: nn.Module) -> bool:
    return any(
        other.weight is head.weight
        for other in model.modules()
        if isinstance(other, VocabParallelEmbedding) and other is not head
    )


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _is_transposed(raw: Tensor) -> bool:
    """vLLM's mark on parameters of experts that hold [E, K, N] what checkpoints hold as [E, N, K]."""
    return bool(getattr(raw, "is_transposed", False)) and raw.ndim == 3


def _raw(slot: Slot, part: str, given: Tensor) -> nn.Parameter:
    """The raw parameter, class and attributes as vLLM made it, holding a copy of the given tensor."""
    template = slot.raw(part)
    with torch.device(get_layerwise_info(slot.module).restore_device):
        param: Any = materialize_meta_tensor(template)
    param.data.copy_(given.mT if _is_transposed(template) else given)
    return param


def _load_on_gpu(module: nn.Module, raw: Mapping[str, nn.Parameter]) -> None:
    stand_in = _stand_in(module)
    for name, param in raw.items():
        stand_in.__dict__.pop(name, None)
        stand_in._parameters[name] = param
    stand_in.quant_method.process_weights_after_loading(stand_in)
    live_names = {live: name for name, live in module._parameters.items() if live is not None}  # some have two
    for live, name in live_names.items():
        made = stand_in._parameters.get(name)
        if made is live:
            continue
        if made is None or _layout(made) != _layout(live):
            raise EngineError(f"{name} of {type(module).__name__} changed its layout over a refill")
        live.data.copy_(made.data)


def _stand_in(module: nn.Module) -> Any:
    """A copy of the layer that can be processed without touching the layer: its own dictionaries, quantization method,
    scheme and kernel objects; the tensors and everything below are shared."""
    stand_in: Any = copy.copy(module)
    for members in ("_parameters", "_buffers", "_modules"):
        stand_in.__dict__[members] = dict(stand_in.__dict__[members])
    stand_in.__dict__.pop("_already_called_process_weights_after_loading", None)
    stand_in.quant_method = copy.copy(module.quant_method)
    if scheme := getattr(module, "scheme", None):
        stand_in.scheme = copy.copy(scheme)
        for name, value in vars(scheme).items():
            if hasattr(value, "process_weights_after_loading"):  # the scheme's kernel
                setattr(stand_in.scheme, name, copy.copy(value))
    return stand_in


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _load_on_cpu(module: nn.Module, raw: Mapping[str, nn.Parameter]) -> None:
    for name, param in raw.items():
        if name == "bias":
            getattr(module, name).data.copy_(param)
            continue
        if hasattr(module, name):  # perhaps as a plain attribute, whose name no parameter could take
            setattr(module, name, None)
        module.register_parameter(name, param)
    _process_on_cpu(module)


def _process_on_cpu(module: nn.Module) -> None:
    method = getattr(module, "quant_method", None)
    if isinstance(method, QuantizeMethodBase) and not any(p.is_cuda for p in module.parameters(recurse=False)):
        module.__dict__.pop("_already_called_process_weights_after_loading", None)
        if hasattr(method, "moe_kernel"):
            method.moe_kernel = None  # with one in place, vLLM takes experts for repacked already, which here is wrong
        method.process_weights_after_loading(module)
