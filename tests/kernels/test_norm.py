"""RMS norm: the definition against transformers, its gradients against autograd, vLLM's ops as vLLM calls them."""

import pytest
import torch
from torch.nn.functional import silu
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from qarl.kernels.norm import engine_rms_norm, rms_norm, rms_norm_grads

EPS = 1e-6


def rows(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(shape, generator=generator) * torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator)
    ).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 7, 48), (1, 5, 4, 32), (3, 1024)], ids=str)
def test_definition_is_that_of_transformers(shape, dtype):
    layer = Qwen3RMSNorm(shape[-1], EPS).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(rows(shape[-1]))
    x = rows(*shape, dtype=dtype)
    assert torch.equal(rms_norm(x, layer.weight, EPS), layer(x))


@pytest.mark.parametrize("shape", [(1, 7, 48), (1, 5, 4, 32), (3, 1024)], ids=str)
def test_gradients_are_those_of_the_definition(shape):
    x, weight, grad = rows(*shape).requires_grad_(), rows(shape[-1]).requires_grad_(), rows(*shape, seed=1)
    ours = rms_norm_grads(grad, x.detach(), weight.detach(), EPS)
    theirs = torch.autograd.grad(rms_norm(x, weight, EPS), (x, weight), grad)
    for mine, definition in zip(ours, theirs, strict=True):
        assert mine.dtype == definition.dtype and mine.shape == definition.shape
        torch.testing.assert_close(mine, definition, rtol=1e-4, atol=1e-5 * definition.abs().max().item())


#: Hidden sizes of SmolLM2-135M and -360M, Qwen3-0.6B and -1.7B; a head of Qwen3.
WIDTHS = [576, 960, 1024, 2048, 128]


@pytest.mark.gpu
@pytest.mark.parametrize("width", WIDTHS)
def test_engine_norm_of_a_sum_equals_the_op_that_adds(width):
    from vllm import _custom_ops as ops

    x, residual = (rows(1, 700, width, dtype=torch.bfloat16, seed=seed).cuda() for seed in (0, 1))
    weight = rows(width, dtype=torch.bfloat16).cuda()
    total = residual + x
    ours = engine_rms_norm(total, weight, EPS, after_addition=True)
    theirs, kept = x[0].clone(), residual[0].clone()
    ops.fused_add_rms_norm(theirs, kept, weight, EPS)
    assert torch.equal(total[0], kept) and torch.equal(ours[0], theirs)
    alone = torch.empty_like(theirs)
    ops.rms_norm(alone, total[0], weight, EPS)
    assert torch.equal(engine_rms_norm(total, weight, EPS)[0], alone)


@pytest.mark.gpu
@pytest.mark.parametrize("after_addition", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_engine_norm_of_a_row_does_not_depend_on_the_number_of_rows(width, after_addition):
    """A learner norms thousands of rows where an engine that decodes has norm of a few."""
    x, weight = rows(700, width, dtype=torch.bfloat16).cuda(), rows(width, dtype=torch.bfloat16).cuda()
    together = engine_rms_norm(x, weight, EPS, after_addition)
    for part in (1, 33, 255):
        pieces = [engine_rms_norm(piece, weight, EPS, after_addition) for piece in x.split(part)]
        assert torch.equal(torch.cat(pieces), together)


@pytest.mark.gpu
@pytest.mark.parametrize("after_addition", [False, True])
@pytest.mark.parametrize("shape", [(1, 300, 1024), (1, 300, 16, 128)], ids=str)
def test_engine_norm_computes_the_definition_forward_and_backward(shape, after_addition):
    x, weight = rows(*shape, dtype=torch.bfloat16).cuda(), rows(shape[-1], dtype=torch.bfloat16).cuda()
    before, grad = x.clone(), rows(*shape, dtype=torch.bfloat16, seed=1).cuda()
    exact = [value.double().requires_grad_() for value in (x, weight)]
    y = engine_rms_norm(x.requires_grad_(), weight.requires_grad_(), EPS, after_addition)
    expected = exact[1] * exact[0] * torch.rsqrt(exact[0].square().mean(-1, keepdim=True) + EPS)
    assert torch.equal(x, before)
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-30)
    ours = torch.autograd.grad(y, (x, weight), grad)
    for mine, theirs in zip(ours, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert mine.dtype == torch.bfloat16 and (mine - theirs).norm() <= 2**-8 * theirs.norm()


@pytest.mark.gpu
def test_silu_and_mul_of_torch_equals_the_engines():
    """Every finite gate with some factors: what lets the learner keep transformers' own."""
    from vllm import _custom_ops  # noqa: F401  loads the op

    gates = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).cuda().view(torch.bfloat16)
    gates = gates[gates.isfinite()][:, None]
    gates = gates.expand(-1, 64).contiguous()
    up = rows(*gates.shape, dtype=torch.bfloat16).cuda()
    theirs = torch.empty_like(gates)
    torch.ops._C.silu_and_mul(theirs, torch.cat([gates, up], -1))
    ours = silu(gates) * up
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    assert same.all(), f"{(~same).sum()} of {same.numel()}"
