"""What a sleeping engine remembers: the tensors of its layers that no refill brings.

An engine that sleeps gives back the memory of its weights and of its KV cache; addresses stay, so graphs stay good. The next
refill brings the weights, which after an update are other ones: no copy of them is kept in host memory. But layers and their
kernel objects hold more than weights: locks that must be zero, strides, permutations, scales of the cache. vLLM restores
registered buffers alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.device_allocator.cumem import CuMemAllocator

from qarl.rollout.layout import Home


def remember(model: nn.Module, homes: Mapping[str, Mapping[str, Home]]) -> list[tuple[Tensor, Tensor]]:
    """(tensor on the device, its values on the host) of everything that layers hold and homes do not."""
    filled = {home.live.data_ptr() for parts in homes.values() for home in parts.values()}
    dropped = [(at, at + data.handle[1]) for at, data in _allocations() if data.tag == "weights"]
    found: dict[int, Tensor] = {}
    for tensor in _held(model):
        at = tensor.data_ptr()
        if any(start <= at < end for start, end in dropped) and at not in filled:
            found[at] = max(found.get(at, tensor), tensor, key=Tensor.numel)  # views begin where the whole does
    return [(tensor, tensor.cpu()) for tensor in found.values()]


@torch.inference_mode()
def restore(remembered: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, values in remembered:
        tensor.copy_(values)


def _allocations() -> list[tuple[int, Any]]:
    """(address, what vLLM knows of it) of memory that sleeping gives back."""
    return list(CuMemAllocator.get_instance().pointer_to_data.items())


def _held(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
        kernel = getattr(getattr(module, "scheme", None), "kernel", None)
        for holder in (module, method, experts, getattr(experts, "quant_config", None), kernel):
            yield from _tensors(holder)


def _tensors(holder: Any) -> Iterator[Tensor]:
    members = {
        **getattr(holder, "_parameters", {}),
        **getattr(holder, "_buffers", {}),
        **getattr(holder, "__dict__", {}),
    }
    for value in members.values():
        if isinstance(value, Tensor):
            yield value.data
