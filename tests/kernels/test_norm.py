"""RMS norm: the definition against transformers, its gradients against autograd, the kernel against both."""

import pytest
import torch
from torch.nn.functional import silu
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from qarl.kernels import norm_fused
from qarl.kernels.norm import fused_rms_norm, rms_norm, rms_norm_grads

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


#: No power of two, one row and many of a program, heads.
SHAPES = [(7, 48), (33, 576), (3, 4096), (1, 5, 4, 32), (0, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fused_norm_computes_the_definition_and_its_gradients(shape, dtype, device):
    """To one place of the last digit: the squares are summed in another order (and Triton's interpreter cuts bfloat16 off)."""
    x, grad = (rows(*shape, dtype=dtype, seed=seed).to(device) for seed in (0, 1))
    weight = rows(shape[-1], dtype=dtype).to(device)
    inputs = [value.clone().requires_grad_() for value in (x, weight)]
    y = fused_rms_norm(inputs[0], inputs[1], EPS)
    assert y.dtype == dtype and y.shape == x.shape
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(y, rms_norm(x, weight, EPS), rtol=2 * ulp + 1e-6, atol=1e-30)
    for mine, theirs in zip(torch.autograd.grad(y, inputs, grad), rms_norm_grads(grad, x, weight, EPS), strict=True):
        assert torch.equal(mine, theirs)


def test_fused_norm_reads_heads_where_they_lie(device):
    wide = rows(9, 5 * 32).to(device)
    heads, weight = wide[:, 32:96].unflatten(-1, (2, 32)), rows(32).to(device)
    assert not heads.is_contiguous()
    assert torch.equal(norm_fused.rms_norm(heads, weight, EPS), norm_fused.rms_norm(heads.contiguous(), weight, EPS))


@pytest.mark.parametrize("value", [0.0, 1e-40, 65504.0, float("inf"), float("nan")])
def test_a_hostile_row_leaves_its_neighbours_alone(value, device):
    x, weight = rows(6, 256).to(device), rows(256).to(device)
    expected = norm_fused.rms_norm(x, weight, EPS)
    x[3] = value
    y = norm_fused.rms_norm(x, weight, EPS)
    others = [0, 1, 2, 4, 5]
    assert torch.equal(y[others], expected[others])
    definition = rms_norm(x, weight, EPS)[3]
    assert torch.allclose(y[3], definition, rtol=1e-5, atol=1e-30, equal_nan=True)


def test_adding_in_the_kernel_is_adding_before(device):
    """The engine adds the residual in the norm, the learner before it."""
    x, residual, weight = rows(70, 576).to(device), rows(70, 576, seed=1).to(device), rows(576).to(device)
    expected = norm_fused.rms_norm(x + residual, weight, EPS)
    total = x + residual
    y, kept = norm_fused.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(kept, total) and torch.equal(y, expected)
    assert y.data_ptr() == x.data_ptr() and kept.data_ptr() == residual.data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("width", [128, 576, 960, 1024, 2048, 2560, 4096, 5120])
def test_bits_of_a_row_do_not_depend_on_the_rows_beside_it(width):
    """A learner norms thousands of rows where an engine that decodes has a few, and adds what the engine adds itself."""
    x, residual = (rows(700, width, dtype=torch.bfloat16, seed=seed).cuda() for seed in (0, 1))
    weight = rows(width, dtype=torch.bfloat16).cuda()
    together = norm_fused.rms_norm(x + residual, weight, EPS)
    for part in (1, 33, 255):
        pieces = [norm_fused.rms_norm(piece, weight, EPS) for piece in (x + residual).split(part)]
        assert torch.equal(torch.cat(pieces), together)
    added, total = norm_fused.add_rms_norm(x.clone(), residual.clone(), weight, EPS)
    assert torch.equal(added, together) and torch.equal(total, x + residual)
    torch.testing.assert_close(together, rms_norm(x + residual, weight, EPS), rtol=2**-7, atol=1e-30)


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
