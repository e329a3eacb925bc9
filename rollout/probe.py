"""What a running vLLM layer multiplies by, read off its kernel: the last look before an engine generates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearBase

from qarl.errors import EngineError
from qarl.rollout.slots import Slot


@torch.inference_mode()  # as vLLM runs its layers: experts write into a workspace that was made so
def served_columns(slots: Mapping[str, Slot], name: str, columns: np.ndarray) -> Tensor:
    """float32 [..., N, C]: the columns of a quantized weight, by sending one-hot inputs through the live layer.

    A one-hot row quantizes without error (one code at the largest value), and whatever layout the kernel made of the
    weights is what answers. It is -1 that is hot: on a CPU without VNNI oneDNN multiplies codes moved up by 128 and saturates
    sums of two, which a 1 among zeros would make it do, and a -1 cannot.
    """
    slot = slots[name]
    module: Any = slot.module
    kept = next(other for other in slots.values() if not other.quantized)  # of the dtype of activations
    like: Any = getattr(kept.module, *kept.params.values())
    one_hot = torch.zeros(len(columns), slot.n_inputs, dtype=like.dtype, device=like.device)
    one_hot.scatter_(1, torch.from_numpy(columns).to(like.device)[:, None], -1)
    if isinstance(module, LinearBase):
        served = module.quant_method.apply(module, one_hot, None)
    else:
        served = _experts_apply(module, slot, one_hot)
    return -served.mT.float()


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
