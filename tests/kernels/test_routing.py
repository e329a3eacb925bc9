"""Tokens to experts and back, against a loop over tokens; and Triton's versions against the definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qarl.kernels import routing, routing_fused
from qarl.kernels.routing import collect, route, row_weights, spread

N_EXPERTS = 5
SHAPES = [(1, 1, 8), (7, 2, 40), (6, 3, 33), (13, 5, 2056)]
"""Tokens, experts of each, features."""


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def chosen(tokens: int, top_k: int, device: str = "cpu", n_experts: int = N_EXPERTS) -> Tensor:
    """Different experts for each token, as a router chooses."""
    return torch.rand(tokens, n_experts, device=device).topk(top_k, dim=1).indices


@pytest.mark.parametrize(("tokens", "top_k", "features"), SHAPES)
def test_rows_are_sorted_by_expert_and_tokens_keep_their_order(tokens: int, top_k: int, features: int) -> None:
    index = chosen(tokens, top_k)
    to = route(index, N_EXPERTS)
    expected = [(e, t, p) for e in range(N_EXPERTS) for t in range(tokens) for p in range(top_k) if index[t, p] == e]
    assert [(slot // top_k, slot % top_k) for slot in to.order.tolist()] == [(t, p) for _, t, p in expected]
    counts = torch.tensor([sum(e == each for each, *_ in expected) for e in range(N_EXPERTS)])
    assert torch.equal(to.offsets, counts.cumsum(0).int()) and to.offsets.dtype == torch.int32
    assert torch.equal(to.order[to.inverse], torch.arange(tokens * top_k))


def test_all_tokens_on_one_expert_and_no_tokens() -> None:
    assert route(torch.full((4, 1), 2), 4).offsets.tolist() == [0, 0, 4, 4]
    nothing = route(torch.empty(0, 2, dtype=torch.int64), 3)
    assert nothing.offsets.tolist() == [0, 0, 0] and collect(spread(torch.empty(0, 8), nothing), nothing).shape == (
        0,
        8,
    )


@pytest.mark.parametrize(("tokens", "top_k", "features"), SHAPES)
def test_there_and_back_against_a_loop(tokens: int, top_k: int, features: int) -> None:
    hidden, weights = torch.randn(tokens, features), torch.rand(tokens, top_k)
    to = route(chosen(tokens, top_k), N_EXPERTS)
    rows, of_rows = spread(hidden, to), row_weights(weights, to)
    expected = torch.zeros(tokens, features)
    for row, slot in enumerate(to.order.tolist()):
        token, place = divmod(slot, top_k)
        assert torch.equal(rows[row], hidden[token]) and of_rows[row] == weights[token, place]
        expected[token] += rows[row] * of_rows[row]
    torch.testing.assert_close(collect(rows * of_rows[:, None], to), expected)


def test_gradients_are_those_of_torchs_own_indexing() -> None:
    to = route(chosen(6, 3), N_EXPERTS)
    ours = [torch.randn(6, 8, requires_grad=True), torch.rand(6, 3, requires_grad=True)]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    dy = torch.randn(6, 8)
    (h, w), (h2, w2) = ours, theirs
    collect(spread(h, to).sin() * row_weights(w, to)[:, None], to).backward(dy)
    token = to.order // 3
    rows = h2[token].sin() * w2.flatten()[to.order, None]
    torch.zeros(6, 8).index_add(0, token, rows).backward(dy)
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad)


def test_bfloat16_is_summed_in_float32_and_rounded_once() -> None:
    """256 + 1 + 1: in bfloat16, one after the other, both ones would be lost."""
    to = route(torch.tensor([[0, 1, 2]]), 3)
    rows = torch.tensor([[256.0], [1.0], [1.0]]).bfloat16()
    assert collect(rows, to).item() == 258


def test_router_weights_of_any_dtype_get_gradients_of_it() -> None:
    weights = torch.rand(4, 2).bfloat16().requires_grad_()
    rows = row_weights(weights, route(chosen(4, 2), N_EXPERTS))
    rows.sum().backward()
    assert rows.dtype == torch.float32 and weights.grad is not None and weights.grad.dtype == torch.bfloat16


BIG = pytest.param(2048, 8, 2048, marks=pytest.mark.gpu)


@pytest.mark.parametrize(("tokens", "top_k", "features"), [*SHAPES, BIG])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_spread_and_collect(tokens: int, top_k: int, features: int, dtype: torch.dtype, device: str) -> None:
    """Copies are equal, and sums those of a loop that adds one after the other."""
    n_experts = max(N_EXPERTS, top_k)
    hidden = torch.randn(tokens, features, device=device).to(dtype)
    to = route(chosen(tokens, top_k, device, n_experts), n_experts)
    rows = routing_fused.spread(hidden, to.order, top_k)
    assert torch.equal(rows, hidden[to.order // top_k])
    rows = torch.randn(rows.shape, device=device).to(dtype)
    expected = torch.zeros(tokens, features, device=device)
    for place in rows[to.inverse].unflatten(0, (-1, top_k)).unbind(1):
        expected += place
    # Triton's interpreter cuts a float32 off to make it bfloat16; a GPU rounds it.
    exact = device == "cuda" or dtype == torch.float32
    ours = routing_fused.collect(rows, to.inverse, top_k)
    torch.testing.assert_close(ours, expected.to(dtype), rtol=0 if exact else 2**-7, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("top_k", [1, 2, 3, 4, 6, 8, 10])
def test_collect_is_vllms_sum(top_k: int) -> None:
    from vllm import _custom_ops as ops

    rows = torch.randn(700 * top_k, 2048, device="cuda").bfloat16()
    to = route(chosen(700, top_k, "cuda", 16), 16)
    theirs = torch.empty(700, 2048, dtype=torch.bfloat16, device="cuda")
    ops.moe_sum(rows[to.inverse].unflatten(0, (-1, top_k)), theirs)
    assert torch.equal(collect(rows, to), theirs)


@pytest.mark.parametrize(
    ("rows", "features"), [(1, 8), (5, 33), (3, 2056), pytest.param(16384, 768, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_weigh(rows: int, features: int, dtype: torch.dtype, device: str) -> None:
    a, b = (torch.randn(rows, features, device=device).to(dtype) for _ in range(2))
    weights = torch.rand(rows, device=device)
    wa, wb, dot = routing_fused.weigh(a, b, weights)
    for ours, theirs in ((wa, a * weights[:, None]), (wb, b * weights[:, None])):
        # Triton's interpreter cuts a float32 off to make it bfloat16; a GPU rounds it.
        exact = device == "cuda" or dtype == torch.float32
        torch.testing.assert_close(ours, theirs.to(dtype), rtol=0 if exact else 2**-7, atol=0)
    torch.testing.assert_close(dot.double(), (a.double() * b.double()).sum(-1), rtol=1e-4, atol=1e-3)
    for ours, theirs in zip(routing.weigh(a, b, weights), (wa, wb, dot), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7 if dtype == torch.bfloat16 else 1e-4, atol=1e-3)


@pytest.mark.parametrize("last", [0, 1, 31, 32, 33, 70])
def test_fused_clear_after(last: int, device: str) -> None:
    rows = torch.full((70, 40), float("nan"), device=device)
    expected = rows.clone()
    expected[last:] = 0
    offsets = torch.tensor([0, last], dtype=torch.int32, device=device)
    for clear in (routing_fused.clear_after, routing.clear_after):
        assert torch.equal(clear(rows.clone(), offsets).nan_to_num(1), expected.nan_to_num(1))


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    hidden = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = torch.rand(64, 4, device="cuda", requires_grad=True)
    index = chosen(64, 4, "cuda", 16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        to = route(index, 16)
        rows = routing.clear_after(spread(hidden, to) * 2, to.offsets)
        collect((rows * row_weights(weights, to)[:, None]).bfloat16(), to).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
