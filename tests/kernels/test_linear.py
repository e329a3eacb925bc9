"""The autograd functions: the forward is the kernel's product, the backward the straight-through formulas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qarl.formats import FORMATS
from qarl.kernels.dispatch import backends, load
from qarl.kernels.linear import (
    Arithmetic,
    aligned_expert_shards,
    aligned_experts,
    aligned_linear,
    plain_arithmetic,
    share_codes,
)

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


def test_every_low_bit_format_is_covered_here() -> None:
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


def halves(name: str, backend: str, weight: Tensor) -> list[tuple[slice, Any]]:
    """Of the inputs, and the operand of each: codes of the whole weight, cut."""
    how, found = arithmetic(name, backend), []
    codes = how.quantize(weight)
    for half in (slice(0, K // 2), slice(K // 2, K)):
        mine = {}
        for part, values in codes.items():
            per = K // values.shape[-1]
            mine[part] = values if per == K else values[..., half.start // per : half.stop // per].contiguous()
        found.append((half, load(name, backend).prepare(mine, how.group, torch.float32)))
    return found


@pytest.mark.parametrize(("name", "backend"), CASES)
@pytest.mark.parametrize("kept", [True, False])
def test_two_shards_are_two_products_each_rounded_by_itself_and_summed(name: str, backend: str, kept: bool) -> None:
    """As two ranks of an engine compute a layer whose inputs they share. Gradients are those of the whole layer."""
    whole = arithmetic(name, backend)
    how = replace(whole, shards=2)
    x, weight, bias, dy = leaf(2, 5, K), leaf(N, K), leaf(N), torch.randn(2, 5, N)
    y = aligned_linear(x, weight, bias, how, how.prepare(weight) if kept else None)
    y.backward(dy)
    product, flat = load(name, backend).product, x.detach().reshape(-1, K)
    (first, one), (second, other) = halves(name, backend, weight)
    expected = product(flat[:, first].contiguous(), one, bias.detach()) + product(flat[:, second].contiguous(), other)
    assert torch.equal(y.detach().reshape(-1, N), expected)
    if FORMATS[name].activation != "none":
        assert not torch.equal(y, aligned_linear(x, weight, bias, whole))  # other scales of the inputs
    x2, weight2, bias2 = (one.detach().clone().requires_grad_() for one in (x, weight, bias))
    aligned_linear(x2, weight2, bias2, whole).backward(dy)
    for ours, theirs in ((x, x2), (weight, weight2), (bias, bias2)):
        assert torch.equal(grad(ours), grad(theirs))


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_two_shards_of_experts_are_two_products_and_have_gradients_each(name: str, backend: str) -> None:
    whole = arithmetic(name, backend)
    how = replace(whole, shards=2)
    x, weight, w = leaf(10, K), leaf(4, N, K), torch.rand(10, requires_grad=True)
    offsets, dy = torch.tensor([3, 3, 4, 8]), torch.randn(2, 10, N)
    shards = aligned_expert_shards(x, weight, offsets, how, how.prepare(weight), w)
    for y, (half, operand) in zip(shards, halves(name, backend, weight), strict=True):
        product = load(name, backend).grouped_product(x.detach()[:, half].contiguous(), operand, offsets, w.detach())
        assert torch.equal(y, product)
    torch.autograd.backward(shards, list(dy))
    grid = how.dequantize(how.quantize(weight), torch.float32).requires_grad_()
    x2, w2 = x.detach().clone().requires_grad_(), w.detach().clone().requires_grad_()
    for half, gradient in zip((slice(0, K // 2), slice(K // 2, K)), dy, strict=True):
        for expert, rows in ((0, slice(0, 3)), (2, slice(3, 4)), (3, slice(4, 8))):
            y = w2[rows, None] * (x2[rows, half] @ grid[expert, :, half].t())
            y.backward(gradient[rows], retain_graph=True)
    torch.testing.assert_close(grad(x), grad(x2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad(weight), grad(grid), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad(w)[:8], grad(w2)[:8], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", [*(arithmetic(*case) for case in CASES), plain_arithmetic(torch.float32)], ids=str)
def test_rows_of_no_expert_are_zero_whatever_stands_in_them(how: Arithmetic) -> None:
    x, weight, row_weights = torch.randn(6, K), torch.randn(3, N, K), torch.rand(6)
    x[4:], row_weights[4:] = float("nan"), float("nan")
    y = aligned_experts(x, weight, torch.tensor([2, 2, 4], dtype=torch.int32), how, row_weights=row_weights)
    assert (y[:4] != 0).all() and (y[4:] == 0).all()


def test_shards_that_would_cut_through_a_group_are_refused() -> None:
    how = Arithmetic("w4a16", 128, "emulated", torch.float32, shards=2)
    for inputs in (128, 384):  # a single group has a single scale, as a whole row would
        with pytest.raises(ValueError, match=f"2 shards of {inputs} inputs would cut through groups of 128"):
            how.prepare(torch.randn(8, inputs))
    with pytest.raises(ValueError, match=r"2 shards of the inputs would cut through an entry of \['weight_scale'\]"):
        share_codes(how.quantize(torch.randn(8, 384)), 2)
    assert len(share_codes(how.quantize(torch.randn(8, 512)), 2)) == 2


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


@pytest.mark.parametrize(("name", "backend"), CASES)
@pytest.mark.parametrize("kept", [True, False])
def test_router_weights_multiply_rows_and_get_their_gradient(name: str, backend: str, kept: bool) -> None:
    """Forward: the float32 product times the weight. Backward: torch's own autograd through a layer on the grid."""
    how = arithmetic(name, backend)
    x, weight, dy, w = leaf(10, K), leaf(4, N, K), torch.randn(10, N), torch.rand(10, requires_grad=True)
    offsets = torch.tensor([3, 3, 4, 8])
    prepared = how.prepare(weight) if kept else None
    plain = aligned_experts(x, weight, offsets, how, prepared).detach()
    y = aligned_experts(x, weight, offsets, how, prepared, w)
    torch.testing.assert_close(y, plain * w[:, None], rtol=2**-22, atol=0)
    y.backward(dy)

    grid = how.dequantize(how.quantize(weight), torch.float32).requires_grad_()
    x2, w2 = (t.detach().clone().requires_grad_() for t in (x, w))
    expert = torch.tensor([0, 0, 0, 2, 3, 3, 3, 3])
    y2 = (torch.einsum("mk,mnk->mn", x2[:8], grid[expert])) * w2[:8, None]
    y2.backward(dy[:8])
    for ours, theirs in ((x, x2), (weight, grid), (w, w2)):
        torch.testing.assert_close(grad(ours), grad(theirs), rtol=1e-4, atol=1e-3)


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
    prepared = how.prepare(weight)
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        aligned_linear(x, weight, None, how, prepared)
    assert saved == {x.data_ptr()}, "and the codes, which the caller has"

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


def test_the_codes_kept_are_what_the_backward_computes_with() -> None:
    """Not the weight as it is by then."""
    how, x, weight = arithmetic("w8a8_int8", "emulated"), leaf(4, K), leaf(N, K)
    y = aligned_linear(x, weight, None, how, how.prepare(weight))
    expected = torch.ones(4, N) @ how.dequantize(how.quantize(weight), torch.float32)
    with torch.no_grad():
        weight.mul_(3)
    y.sum().backward()
    torch.testing.assert_close(grad(x), expected)


def test_a_compiled_function_gives_the_same_numbers() -> None:
    """The graph breaks at ours; what lies around is traced."""
    how, weight, x = arithmetic("w8a8_int8", "emulated"), leaf(4, N, K), leaf(10, K)
    offsets = torch.tensor([3, 3, 4, 8])

    def layer(x: Tensor) -> Tensor:
        rows = aligned_linear(x.sin(), weight[0], None, how).cos()
        return rows + aligned_experts(x.exp(), weight, offsets, how).tanh()

    layer(x).sum().backward()
    expected, x.grad = (layer(x).detach(), grad(x)), None
    y = torch.compile(layer, backend="eager")(x)
    y.sum().backward()
    assert torch.equal(y.detach(), expected[0]) and torch.equal(grad(x), expected[1])


ON_GPU = [(name, backend) for name in ("w8a8_int8", "w8a8_fp8", "w4a16") for backend in ("engine", "fused")]
ON_GPU.remove(("w4a16", "engine"))


def skip_where_refused(name: str, backend: str) -> None:
    if reason := backends(name, "cuda", torch.bfloat16)[backend]:
        pytest.skip(reason)


def experts_on_gpu(features: tuple[int, int] = (384, 512)) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, weight, offsets, router weights and dY: 6 experts of 0 to 300 rows, none of them a multiple of 8; 5 rows of none."""
    n, k = features
    counts = torch.tensor([37, 0, 300, 1, 0, 163])
    m = int(counts.sum()) + 5
    x, dy = (torch.randn(m, size, device="cuda").bfloat16() for size in (k, n))
    weight = (torch.randn(len(counts), n, k, device="cuda") / k**0.5).bfloat16()
    offsets = counts.cumsum(0).to("cuda", torch.int32)
    return x.requires_grad_(), weight.requires_grad_(), offsets, torch.rand(m, device="cuda").requires_grad_(), dy


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "backend"), ON_GPU)
@pytest.mark.parametrize("kept", [True, False])
def test_experts_on_a_gpu_against_float64(name: str, backend: str, kept: bool) -> None:
    """Gradients of the grouped products against float64 on the grid; an expert without rows has exactly none."""
    skip_where_refused(name, backend)
    how = arithmetic(name, backend, torch.bfloat16)
    x, weight, offsets, w, dy = experts_on_gpu()
    # Memory that torch hands out again is full of NaN: what is not written shows.
    del_me = [torch.full((64, 1024, 1024), float("nan"), device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    del del_me
    y = aligned_experts(x, weight, offsets, how, how.prepare(weight.detach()) if kept else None, w)
    y.backward(dy)
    last = int(offsets[-1])
    assert not y[last:].any() and not grad(x)[last:].any() and not grad(weight)[[1, 4]].any()
    grid = how.dequantize(how.quantize(weight.detach()), torch.float32).double()
    expert = torch.searchsorted(offsets, torch.arange(last, device="cuda"), right=True)
    x64, w64, dy64 = x.detach()[:last].double(), w.detach()[:last, None].double(), dy[:last].double()
    pulled = torch.stack([row @ grid[e] for row, e in zip(dy64, expert.tolist(), strict=True)])
    torch.testing.assert_close(grad(x)[:last].double(), w64 * pulled, rtol=2**-6, atol=2**-7)
    torch.testing.assert_close(grad(w)[:last].double(), (pulled * x64).sum(-1), rtol=2**-6, atol=1.0)
    for e in range(len(weight)):
        own = expert == e
        exact = (dy64[own].t() @ (w64 * x64)[own]).float()
        scale = float(exact.abs().max()) if own.any() else 1.0
        torch.testing.assert_close(grad(weight)[e].float(), exact, rtol=2**-6, atol=2**-8 * scale)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "backend"), ON_GPU)
def test_forward_on_a_gpu_is_near_the_definition(name: str, backend: str) -> None:
    """int8: equal bit for bit; fp8 and int4 to the order of float32 sums."""
    skip_where_refused(name, backend)
    how, definition = arithmetic(name, backend, torch.bfloat16), arithmetic(name, "emulated", torch.bfloat16)
    x, weight, offsets, w, _ = (t.detach() for t in experts_on_gpu())
    cases = [
        (aligned_linear(x, weight[0], None, a), aligned_experts(x, weight, offsets, a, None, w))
        for a in (how, definition)
    ]
    for ours, theirs in zip(*cases, strict=True):
        scale = theirs.float().abs().mean()
        # Tensor cores sum products of e4m3 in fewer bits than float32.
        assert (ours.float() - theirs.float()).abs().mean() <= (1e-2 if name == "w8a8_fp8" else 2e-3) * scale
        if name == "w8a8_int8":
            assert torch.equal(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "backend"), ON_GPU)
def test_experts_on_a_gpu_never_wait_for_the_device(name: str, backend: str) -> None:
    skip_where_refused(name, backend)
    how = arithmetic(name, backend, torch.bfloat16)
    x, weight, offsets, w, dy = experts_on_gpu()
    prepared = how.prepare(weight.detach())
    for mode in ("default", "error"):  # the first compiles kernels
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            aligned_experts(x, weight, offsets, how, prepared, w).backward(dy)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "backend"), ON_GPU)
@pytest.mark.parametrize("shards", [1, 2])
def test_a_new_version_is_written_over_the_old_one_where_that_lies(name: str, backend: str, shards: int) -> None:
    """CUDA graphs of the canaries hold the addresses of codes and of what the products take."""
    skip_where_refused(name, backend)
    how = replace(arithmetic(name, backend, torch.bfloat16), shards=shards)
    old, new = (torch.randn(4, 256, 512, device="cuda").bfloat16() for _ in range(2))
    before = how.prepare(old)
    held = [before.codes, *before.shares]
    addresses = [values.data_ptr() for codes in held for values in codes.values()]
    after, fresh = how.prepare(new, before), how.prepare(new)
    assert [values.data_ptr() for codes in (after.codes, *after.shares) for values in codes.values()] == addresses
    for codes, expected in zip(held, (fresh.codes, *fresh.shares), strict=True):
        for part, values in codes.items():
            assert torch.equal(values.view(torch.uint8), expected[part].view(torch.uint8)), part
    x, offsets = torch.randn(40, 512, device="cuda").bfloat16(), torch.tensor([7, 7, 30, 40], device="cuda").int()
    for ours, theirs in zip(
        how.grouped_products(x, after.operand, offsets, None),
        how.grouped_products(x, fresh.operand, offsets, None),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
def test_no_16_bit_copy_of_a_weight_is_kept_on_a_gpu() -> None:
    """Codes are half of bfloat16's bytes, or a quarter; nothing else may stay after `prepare`."""
    for name, backend in ON_GPU:
        if backends(name, "cuda", torch.bfloat16)[backend]:
            continue
        how = arithmetic(name, backend, torch.bfloat16)
        weight = torch.randn(8, 512, 1024, device="cuda", dtype=torch.bfloat16)
        how.prepare(weight)  # compiles kernels
        before = torch.cuda.memory_allocated()
        prepared = how.prepare(weight)
        kept = torch.cuda.memory_allocated() - before
        assert kept <= (0.27 if name == "w4a16" else 0.52) * weight.nbytes, (name, backend, kept / weight.nbytes)
        del prepared


@pytest.mark.parametrize("weighted", [False, True])
def test_plain_experts_compute_what_their_definition_says(device, weighted):
    """bfloat16: the tolerances are a few of its roundings."""
    x, weight = (torch.randn(shape, device=device).bfloat16().requires_grad_() for shape in ((6, 16), (3, 8, 16)))
    weights = torch.rand(6, device=device).requires_grad_() if weighted else None
    offsets = torch.tensor([2, 2, 6], dtype=torch.int32, device=device)
    learned = [t for t in (x, weight, weights) if t is not None]
    dy = torch.randn(6, 8, device=device).bfloat16()
    y = aligned_experts(x, weight, offsets, plain_arithmetic(x.dtype), None, weights)
    expected = torch.cat([x[:2] @ weight[0].T, x[2:] @ weight[2].T]) * (1 if weights is None else weights[:, None])
    torch.testing.assert_close(y.float(), expected.float(), rtol=0.02, atol=0.02)
    for ours, theirs in zip(
        torch.autograd.grad(y, learned, dy), torch.autograd.grad(expected, learned, dy.to(expected.dtype)), strict=True
    ):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.05, atol=0.05)


def test_router_weights_of_plain_experts_stay_float32(device):
    """As in vLLM, whose router's are; the product with a rounded row is rounded once."""
    x, weight = (torch.randn(shape, device=device).bfloat16() for shape in ((6, 16), (3, 8, 16)))
    weights, offsets = torch.rand(6, device=device), torch.tensor([2, 2, 6], dtype=torch.int32, device=device)
    y = aligned_experts(x, weight, offsets, plain_arithmetic(x.dtype), None, weights)
    assert torch.equal(
        y, (aligned_experts(x, weight, offsets, plain_arithmetic(x.dtype)).float() * weights[:, None]).bfloat16()
    )
