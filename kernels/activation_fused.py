"""The gradient of silu(gate) · up in one pass over memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def silu_and_multiply_grad(dy: Tensor, gate_up: Tensor) -> Tensor:
    """[M, 2F] from dy [M, F] and gate_up [M, 2F], as `activation.silu_and_multiply_grad`."""
    dy, gate_up = dy.contiguous(), gate_up.contiguous()
    grad = torch.empty_like(gate_up)
    rows, width = dy.shape
    if dy.numel():
        block = min(1024, triton.next_power_of_2(width))
        with torch.cuda.device_of(dy):
            _silu_grad_kernel[(rows, triton.cdiv(width, block))](dy, gate_up, grad, width, BLOCK=block)
    return grad


@triton.jit
def _silu_grad_kernel(dy, gate_up, grad, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < width
    at = row * 2 * width + columns
    d = tl.load(dy + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + at + width, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate = d * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(grad + at, d_gate.to(grad.dtype.element_ty), mask=mask)
    tl.store(grad + at + width, (d * gate * sigmoid).to(grad.dtype.element_ty), mask=mask)
