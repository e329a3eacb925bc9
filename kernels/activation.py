"""silu(gate) · up of experts, whose gate and up are computed in one piece. Nothing but that piece is saved."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def silu_and_multiply(gate_up: Tensor) -> Tensor:
    """[M, F] from gate_up [M, 2F], gate first. silu is rounded before it is multiplied, as in vLLM's `silu_and_mul`."""
    return _SiluAndMultiply.apply(gate_up)


class _SiluAndMultiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        if gate_up.is_cuda:  # torch would pass over memory four times as often
            from qarl.kernels import activation_fused

            return activation_fused.silu_and_multiply_grad(dy, gate_up)
        return silu_and_multiply_grad(dy, gate_up)


def silu_and_multiply_grad(dy: Tensor, gate_up: Tensor) -> Tensor:
    """[M, 2F] from dy [M, F]: with σ = sigmoid(gate), d gate = dy · up · σ (1 + gate (1 - σ)), d up = dy · gate · σ.

    In float32, rounded once.
    """
    gate, up = (x.float() for x in gate_up.chunk(2, dim=-1))
    sigmoid = gate.sigmoid()
    d_gate = dy * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat([d_gate, dy * gate * sigmoid], dim=-1).to(gate_up.dtype)
