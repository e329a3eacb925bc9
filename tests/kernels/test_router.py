"""A router's choice: the definition against transformers, its gradient against autograd, vLLM's op against both."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from qarl.kernels import router
from qarl.kernels.router import engine_top_experts, top_experts, top_experts_grad

SHAPES = [(1, 4, 1), (7, 5, 2), (33, 128, 8), (0, 8, 2)]
"""Tokens, experts, those chosen of them."""
normalized = pytest.mark.parametrize("normalize", [False, True])
shapes = pytest.mark.parametrize(("tokens", "n_experts", "top_k"), SHAPES)


def draw(tokens: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, n, generator=torch.Generator().manual_seed(seed))


@normalized
def test_definition_is_that_of_transformers(normalize: bool) -> None:
    config = Qwen3MoeConfig(hidden_size=32, num_experts=16, num_experts_per_tok=4, norm_topk_prob=normalize)
    module, hidden = Qwen3MoeTopKRouter(config), draw(9, 32)
    torch.nn.init.normal_(module.weight)
    logits, weights, experts = module(hidden)
    ours = top_experts(F.linear(hidden, module.weight), 4, normalize)
    assert torch.equal(ours[0], weights) and torch.equal(ours[1], experts)


@normalized
@shapes
def test_gradient_is_autograds(tokens: int, n_experts: int, top_k: int, normalize: bool) -> None:
    logits, grad = draw(tokens, n_experts).requires_grad_(), draw(tokens, top_k, 1)
    weights, experts = top_experts(logits, top_k, normalize)
    (expected,) = torch.autograd.grad(weights, logits, grad)
    ours = top_experts_grad(grad, logits.detach(), weights.detach(), experts.int(), normalize)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@normalized
def test_what_the_op_gives_is_differentiable(normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the definition in the op's place, which runs on CUDA only."""
    monkeypatch.setattr(router, "_engine_topk_softmax", top_experts)
    logits, grad = draw(6, 8).bfloat16().requires_grad_(), draw(6, 3, 1)
    weights, experts = engine_top_experts(logits, 3, normalize)
    assert weights.requires_grad and not experts.requires_grad
    weights.backward(grad)
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16
    expected = top_experts_grad(grad, logits.detach(), weights.detach(), experts, normalize)
    assert torch.equal(logits.grad, expected)


@pytest.mark.gpu
@normalized
@pytest.mark.parametrize(("tokens", "n_experts", "top_k"), [*SHAPES, (5000, 128, 8), (300, 60, 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_engine_is_vllms_router_and_near_the_definition(
    tokens: int, n_experts: int, top_k: int, normalize: bool, dtype: torch.dtype
) -> None:
    """Logits that are all different, so that nothing but rounding could choose otherwise."""
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import fused_topk

    order = torch.rand(tokens, n_experts, generator=torch.Generator().manual_seed(0)).argsort(-1)
    logits = (order.cuda() / 32 - 2).to(dtype).requires_grad_()
    weights, experts = engine_top_experts(logits, top_k, normalize)
    if tokens:
        theirs = fused_topk(logits.detach(), logits.detach(), top_k, normalize)
        assert torch.equal(weights, theirs[0]) and torch.equal(experts, theirs[1])
    definition = logits.detach().float().requires_grad_()
    expected, chosen = top_experts(definition, top_k, normalize)
    assert torch.equal(experts.long(), chosen)
    torch.testing.assert_close(weights, expected, rtol=2e-6, atol=1e-9)
    grad = torch.randn_like(weights)
    (ours,), (exact,) = torch.autograd.grad(weights, logits, grad), torch.autograd.grad(expected, definition, grad)
    torch.testing.assert_close(ours.float(), exact, rtol=2**-7 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)


@pytest.mark.gpu
def test_of_equal_logits_the_engine_takes_the_lower_experts() -> None:
    weights, experts = engine_top_experts(torch.zeros(3, 128, device="cuda", dtype=torch.bfloat16), 8, True)
    assert experts.tolist() == 3 * [list(range(8))] and torch.equal(weights, torch.full_like(weights, 1 / 8))


@pytest.mark.gpu
def test_logits_do_not_depend_on_how_many_tokens_there_are() -> None:
    """The product is torch's in learner and engine: a kernel chosen by the number of rows would route a token otherwise."""
    hidden, weight = draw(4096, 2048).bfloat16().cuda(), draw(128, 2048, 1).bfloat16().cuda()
    together = F.linear(hidden, weight)
    for part in (1, 8, 16, 64, 200, 512, 1024, 2048):
        alone = torch.cat([F.linear(rows, weight) for rows in hidden[: 4 * part].split(part)])
        assert torch.equal(alone, together[: 4 * part]), f"{part} rows at a time"
