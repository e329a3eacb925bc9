"""A router's choice of experts from its logits: `top_experts` is the definition, `engine_top_experts` vLLM's own op on CUDA.

They differ in the last bit of the weights: the op adds up the exponentials in another order and multiplies by reciprocals. Of equal
logits it takes the lower expert, torch any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def top_experts(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """logits [T, E] -> weights float32 and experts, integers, both [T, top_k], the largest first.

    The weights are the softmax over all E experts; where `normalize`, divided by the sum of those chosen.
    """
    weights, experts = logits.softmax(-1, dtype=torch.float32).topk(top_k, dim=-1)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, experts


def routed(
    hidden: Tensor,
    weight: Tensor,
    top_k: int,
    normalize: bool,
    choose: Callable[..., tuple[Tensor, Tensor]] = top_experts,
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [*, H], weight [E, H] -> logits [T, E], weights float32 and experts [T, top_k], chosen by `choose`.
    As transformers computes it, but the weights stay float32, as in vLLM: experts that quantize their inputs multiply by
    them before they round."""
    logits = F.linear(hidden.reshape(-1, weight.shape[-1]), weight)
    return logits, *choose(logits, top_k, normalize)


@torch.compiler.disable
def engine_top_experts(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """The same by vLLM's op, which takes CUDA tensors only; experts int32."""
    return _EngineTopExperts.apply(logits, top_k, normalize)


def top_experts_grad(grad: Tensor, logits: Tensor, weights: Tensor, experts: Tensor, normalize: bool) -> Tensor:
    """[T, E] in logits' dtype, from the gradient [T, top_k] of the weights, the choice held fixed.

    With p the softmax over all experts and s = sum of g w over the chosen: dlogits = w g [chosen] - p s. Normalized weights are the
    softmax over the chosen alone: p is w there, and 0 elsewhere.
    """
    total = (grad * weights).sum(-1, keepdim=True)
    if normalize:
        dlogits, chosen = torch.zeros_like(logits, dtype=torch.float32), weights * (grad - total)
    else:
        dlogits, chosen = -total * logits.softmax(-1, dtype=torch.float32), weights * grad
    return dlogits.scatter_add_(-1, experts.long(), chosen).to(logits.dtype)


class _EngineTopExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
        weights, experts = _engine_topk_softmax(logits, top_k, normalize)
        ctx.save_for_backward(logits, weights, experts)
        ctx.normalize = normalize
        ctx.mark_non_differentiable(experts)
        return weights, experts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, weights, experts = ctx.saved_tensors
        return top_experts_grad(grad, logits, weights, experts, ctx.normalize), None, None


def _engine_topk_softmax(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """As vLLM's `fused_topk` calls it."""
    from vllm import _custom_ops as ops

    shape = len(logits), top_k
    weights = torch.empty(shape, dtype=torch.float32, device=logits.device)
    experts, slots = (torch.empty(shape, dtype=torch.int32, device=logits.device) for _ in range(2))
    if len(logits):
        ops.topk_softmax(weights, experts, slots, logits.contiguous(), normalize)
    return weights, experts
