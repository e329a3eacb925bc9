"""The autograd functions: the forward is the kernel's product, the backward the straight-through formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qarl.formats import FORMATS
from qarl.kernels.dispatch import backends, load
from qarl.kernels.linear import Arithmetic, aligned_experts, aligned_linear

CASES = [
    (name, backend)
    for name, format in FORMATS.items()
    if format.quantizes
    for backend, reason in backends(name, "cpu", torch.float32).items()
    if reason is None
]
N, K = 48, 256


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def arithmetic(name: str, backend: str, dtype: torch.dtype = torch.float32) -> Arithmetic:
    return Arithmetic(name, FORMATS[name].group, backend, dtype)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def test_both_backends_of_int8_are_covered_here() -> None:
    assert ("w8a8_int8", "emulated") in CASES and {name for name, _ in CASES} == set(FORMATS) - {"bf16"}


@pytest.mark.parametrize(("name", "backend"), CASES)
@pytest.mark.parametrize("rows", [(), (1,), (3,), (2, 5), (0,), (2, 0)])
def test_linear_forward_and_backward(name: str, backend: str, rows: tuple[int, ...]) -> None:
    how = arithmetic(name, backend)
    x, weight, bias, dy = leaf(*rows, K), leaf(N, K), leaf(N), torch.randn(*rows, N)
    y = aligned_linear(x, weight, bias, how)
    y.backward(dy)
    expected = load(name, backend).product(x.detach().reshape(-1, K), how.prepare(weight).operand, bias.detach())
    assert torch.equal(y.detach(), expected.view(*rows, N))
    grid = how.dequantize(how.quantize(weight), torch.float32)
    flat = dy.reshape(-1, N)
    torch.testing.assert_close(grad(x), dy @ grid)
    torch.testing.assert_close(grad(weight), flat.t() @ x.detach().reshape(-1, K))
    torch.testing.assert_close(grad(bias), flat.sum(0))


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_prepared_once_changes_nothing(name: str, backend: str) -> None:
    how, weight, x = arithmetic(name, backend), leaf(N, K), leaf(3, K)
    prepared = how.prepare(weight)
    for _ in range(2):
        assert torch.equal(aligned_linear(x, weight, None, how, prepared), aligned_linear(x, weight, None, how))


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_gradient_is_that_of_a_linear_layer_on_the_grid(name: str, backend: str) -> None:
    """Against torch's own autograd, with Ŵ as the leaf: the same dX; the same dW, passed straight through."""
    how, weight, x, dy = arithmetic(name, backend), leaf(N, K), leaf(5, K), torch.randn(5, N)
    aligned_linear(x, weight, None, how).backward(dy)
    grid, x2 = how.dequantize(how.quantize(weight), torch.float32).requires_grad_(), x.detach().clone().requires_grad_()
    torch.nn.functional.linear(x2, grid).backward(dy)
    torch.testing.assert_close(grad(x), grad(x2))
    torch.testing.assert_close(grad(weight), grad(grid))


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_experts_are_linear_layers_on_their_rows(name: str, backend: str) -> None:
    """Four experts with 3, 0, 1 and 4 rows, and two rows of none."""
    how = arithmetic(name, backend)
    x, weight, dy = leaf(10, K), leaf(4, N, K), torch.randn(10, N)
    offsets = torch.tensor([3, 3, 4, 8], dtype=torch.int32)
    y = aligned_experts(x, weight, offsets, how, how.prepare(weight))
    y.backward(dy)
    assert not y[8:].any() and not grad(x)[8:].any() and not grad(weight)[1].any()
    for expert, rows in ((0, slice(0, 3)), (2, slice(3, 4)), (3, slice(4, 8))):
        x1, w1 = x.detach()[rows].requires_grad_(), weight.detach()[expert].requires_grad_()
        y1 = aligned_linear(x1, w1, None, how)
        y1.backward(dy[rows])
        # Experts multiply by their scales in another order: two roundings of 2^-24 each.
        torch.testing.assert_close(y[rows], y1, rtol=2**-22, atol=0)
        torch.testing.assert_close(grad(x)[rows], grad(x1))
        torch.testing.assert_close(grad(weight)[expert], grad(w1))


def test_experts_without_any_row() -> None:
    how, weight = arithmetic("w8a8_int8", "emulated"), leaf(3, N, K)
    y = aligned_experts(leaf(0, K), weight, torch.zeros(3, dtype=torch.int64), how)
    y.sum().backward()
    assert y.shape == (0, N) and not grad(weight).any()


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_only_inputs_and_the_parameter_are_saved_and_it_may_leave_in_between(name: str, backend: str) -> None:
    """As ZeRO-3 does: the storage goes after the forward, and comes back, elsewhere, before the backward."""
    how, x, dy = arithmetic(name, backend), leaf(5, K), torch.randn(5, N)
    reference = leaf(N, K)
    weight = reference.detach().clone().requires_grad_()
    aligned_linear(x, reference, None, how).backward(dy)
    expected, x.grad = grad(x), None

    saved = set()

    def note(tensor: Tensor) -> Tensor:
        saved.add(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        aligned_linear(x, weight, None, how)
    assert saved == {x.data_ptr(), weight.data_ptr()}

    y = aligned_linear(x, weight, None, how)
    weight.data = torch.empty(0)
    weight.data = reference.detach().clone()
    y.backward(dy)
    assert torch.equal(grad(x), expected) and torch.equal(grad(weight), grad(reference))


def test_gradients_not_asked_for_are_not_made() -> None:
    how, x, weight = arithmetic("w8a8_int8", "emulated"), leaf(3, K), torch.randn(N, K)
    aligned_linear(x, weight, None, how).sum().backward()
    assert x.grad is not None and weight.grad is None
    with torch.no_grad():
        assert not aligned_linear(x, weight, None, how).requires_grad


@pytest.mark.parametrize("name", ["w8a8_int8", "w8a8_fp8", "w4a16"])
def test_bfloat16_layers_with_float32_masters(name: str) -> None:
    how = arithmetic(name, "emulated", torch.bfloat16)
    x, weight = leaf(4, K, dtype=torch.bfloat16), leaf(N, K)
    y = aligned_linear(x, weight, None, how)
    y.sum().backward()
    assert y.dtype == grad(x).dtype == torch.bfloat16 and grad(weight).dtype == torch.float32


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    how, x, weight = arithmetic("w8a8_int8", "emulated"), leaf(4, K), leaf(N, K)
    aligned_linear(x, weight, None, how).square().sum().backward()
    grads = grad(x).clone(), grad(weight).clone()
    x.grad = weight.grad = None
    again = torch.utils.checkpoint.checkpoint(lambda t: aligned_linear(t, weight, None, how), x, use_reentrant=False)
    again.square().sum().backward()
    assert torch.equal(grad(x), grads[0]) and torch.equal(grad(weight), grads[1])
