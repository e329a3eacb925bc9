"""New weights for a running vLLM model, module by module.

On a GPU a layer is written where it lives (`rollout.layout`), once its homes are known. Until then, and where they are not, it goes
through what vLLM's own loader does when it starts: the layer's raw tensors are made anew from vLLM's record, the published codes
copied into them, and the layer's own `process_weights_after_loading` runs again, on a stand-in of the layer; what comes out is
copied into the tensors of the layer itself. CUDA graphs read those, and what the layer's kernel object holds besides (a workspace
of locks, strides, permutations): the stand-in leaves every one of them at its address. On a CPU the layer itself is processed,
since its kernel objects hold weights.

Everything here runs in the worker's process, with vLLM's configuration set.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.model_loader.reload.meta import materialize_meta_tensor

from qarl.errors import EngineError
from qarl.kernels.checksum import Fixed
from qarl.kernels.graph import Recording
from qarl.rollout.layout import Home, Plain, homes
from qarl.rollout.slots import Slot, expected, find_slots, is_tied, is_transposed
from qarl.transfer import Tensors

logger = logging.getLogger(__name__)


class Refill:
    """A model, and where its tensors live."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.slots = model, find_slots(model)
        self._on_gpu = any(parameter.is_cuda for parameter in model.parameters())
        self.homes: dict[str, dict[str, Home]] = {}
        """Fused name -> part -> home, of tensors that are written in place."""
        self.specs = expected(self.slots)
        self._sums: tuple[tuple[str, ...], Recording[Tensor]] | None = None
        """Names, and what sums the bytes of their parts."""
        self._foreign: set[nn.Module] = set()
        self._members: dict[nn.Module, list[Slot]] = {}
        for slot in self.slots.values():
            self._members.setdefault(slot.module, []).append(slot)

    def forget_homes(self) -> None:
        """Every module goes through vLLM's own processing once more."""
        self.homes, self._sums = {}, None

    @torch.no_grad()
    def load(self, tensors: Tensors) -> None:
        """Serve these, of whole modules, from now on. Raises `EngineError` where a layer changes its layout."""
        for module in dict.fromkeys(self.slots[name].module for name in tensors):
            members = self._members[module]
            if all(slot.name in self.homes for slot in members):
                for slot in members:
                    for part, home in self.homes[slot.name].items():
                        home.write(tensors[slot.name][part])
                continue
            _reload(module, members, tensors)
            found = {slot.name: homes(slot) for slot in members} if self._on_gpu else {}
            if found and all(found.values()):
                self.homes |= {name: parts for name, parts in found.items() if parts}
            elif found and module not in self._foreign:
                self._foreign.add(module)
                logger.warning(
                    "%s: kept by vLLM in a way not known here, refilled by its own loader and checked as it arrives",
                    list(found),
                )

    @torch.no_grad()
    def read_back(self, names: tuple[str, ...]) -> Tensor:
        """int64 [parts]: pending checksums of these tensors' parts as they are served. Each has a home. Of a few launches a tensor
        one graph is made; its next replay writes the same numbers."""
        if not names:
            return torch.empty(0, dtype=torch.int64)
        if self._sums is None or self._sums[0] != names:
            self._sums = names, Recording(self._summing(names))
        return self._sums[1].replay()

    def _summing(self, names: tuple[str, ...]) -> Callable[[], Tensor]:
        parts = [home for name in names for home in self.homes[name].values()]
        fixed = Fixed([home.live for home in parts if isinstance(home, Plain)])

        def sums() -> Tensor:
            of_plain = iter(fixed.pending().unbind())
            return torch.stack([next(of_plain) if isinstance(home, Plain) else home.pending() for home in parts])

        return sums

    @torch.no_grad()
    def loaded(self) -> None:
        """All tensors of a version were loaded."""
        head = getattr(self.model, "lm_head", None)
        if isinstance(head, ParallelLMHead) and is_tied(head, self.model):
            _process_on_cpu(head)  # it multiplies by a repacked copy of the embedding
        wait()


def wait() -> None:
    """For a batch or a load still under way: vLLM has a stream of its own, which another thread would not use."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _reload(module: nn.Module, members: list[Slot], tensors: Tensors) -> None:
    """As vLLM's own loader does."""
    given = {param: (slot, part) for slot in members for part, param in slot.params.items()}
    method = getattr(module, "quant_method", None)
    if not isinstance(method, QuantizeMethodBase) or isinstance(module, VocabParallelEmbedding):
        # Read as it is, or shared with a tied lm_head. The padding of an embedding stays as it was.
        for param, (slot, part) in given.items():
            values = tensors[slot.name][part]
            getattr(module, param).data[: len(values)].copy_(values)
        _process_on_cpu(module)
        return
    raw = {param: _raw(slot, part, tensors[slot.name][part]) for param, (slot, part) in given.items()}
    if all(param.is_cuda for param in raw.values()):
        _load_on_gpu(module, raw)
    else:
        _load_on_cpu(module, raw)


def _raw(slot: Slot, part: str, given: Tensor) -> nn.Parameter:
    """The raw parameter, class and attributes as vLLM made it, holding a copy of the given tensor."""
    template = slot.raw(part)
    with torch.device(get_layerwise_info(slot.module).restore_device):
        param: Any = materialize_meta_tensor(template)
    param.data.copy_(given.mT if is_transposed(template) else given)
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
