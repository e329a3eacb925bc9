"""silu(gate) · up: the forward's bits are torch's, the gradients those of torch's autograd in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qarl.kernels import activation_fused
from qarl.kernels.activation import silu_and_multiply, silu_and_multiply_grad


def case(rows: int, width: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gate_up, dy = (torch.randn(rows, size, generator=generator).to(device, dtype) for size in (2 * width, width))
    gate_up[0, 0], gate_up[0, 1] = 100, -100  # where the sigmoid is 1 and 0
    return gate_up, dy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_torchs_and_backward_its_gradient(dtype: torch.dtype) -> None:
    gate_up, dy = case(5, 33, dtype)
    gate_up.requires_grad_()
    y = silu_and_multiply(gate_up)
    gate, up = gate_up.detach().chunk(2, dim=-1)
    assert torch.equal(y, F.silu(gate) * up)
    y.backward(dy)
    exact = gate_up.detach().double().requires_grad_()
    gate64, up64 = exact.chunk(2, dim=-1)
    (F.silu(gate64) * up64).backward(dy.double())
    assert gate_up.grad is not None and exact.grad is not None and gate_up.grad.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(gate_up.grad.double(), exact.grad, rtol=tolerance, atol=1e-6)


@pytest.mark.filterwarnings(
    "ignore:overflow encountered in exp"
)  # exp(100) in float32: its sigmoid is 0, as it should be
@pytest.mark.parametrize(
    ("rows", "width"), [(1, 2), (5, 33), (3, 1032), pytest.param(16384, 768, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_gradient_is_the_definitions(rows: int, width: int, dtype: torch.dtype, device: str) -> None:
    gate_up, dy = case(rows, width, dtype, device)
    ours, theirs = activation_fused.silu_and_multiply_grad(dy, gate_up), silu_and_multiply_grad(dy, gate_up)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7  # the interpreter cuts bfloat16 off
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=1e-6)


def test_nothing_is_saved_but_the_input_and_no_rows_are_fine() -> None:
    gate_up = case(4, 8, torch.float32)[0].requires_grad_()
    saved: set[int] = set()

    def note(tensor: Tensor) -> Tensor:
        saved.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        silu_and_multiply(gate_up)
    assert saved == {gate_up.data_ptr()}
    empty = torch.empty(0, 8, requires_grad=True)
    silu_and_multiply(empty).sum().backward()
    assert empty.grad is not None and empty.grad.shape == (0, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [768, 1536])
def test_forward_is_vllms_at_every_gate(width: int) -> None:
    from vllm import _custom_ops  # noqa: F401  loads the op

    gates = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gate = gates[gates.isfinite()].cuda()[:, None].expand(-1, width)
    gate_up = torch.cat([gate, torch.randn(len(gate), width, device="cuda").bfloat16()], -1)
    theirs = torch.empty_like(gate_up[:, :width])
    torch.ops._C.silu_and_mul(theirs, gate_up)
    torch.testing.assert_close(silu_and_multiply(gate_up), theirs, rtol=0, atol=0, equal_nan=True)
