"""Marlin's order: that of vLLM's own functions, back again, on every shape that may come; the kernel equal to the definition.

Without a GPU the kernel runs in Triton's interpreter. Inputs are new in every run; a failure prints their seed.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor

from qarl.kernels import marlin, marlin_fused, w4a16
from qarl.kernels.checksum import pending

SHAPES = [(64, 16), (64, 32), (128, 272), (192, 256), (64, 528), (320, 48)]
"""(N, K): the smallest, and K on both sides of a program's 256 and of its multiples."""


@pytest.fixture(autouse=True)
def seed() -> None:
    seed = time.time_ns() % 2**32
    print("seed", seed)
    torch.manual_seed(seed)


@pytest.fixture(params=[marlin, marlin_fused], ids=["definition", "fused"])
def module(request: pytest.FixtureRequest) -> Any:
    return request.param


def words(*shape: int) -> Tensor:
    """Every nibble, the sign bit among them."""
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)


def vllms(codes: Tensor) -> Tensor:
    """vLLM's own words, by its index tables in numpy."""
    reference = pytest.importorskip("vllm.model_executor.layers.quantization.utils.marlin_utils_test")
    values = w4a16.unpack(codes).to(torch.int32).t().contiguous() + 8
    return reference.marlin_weights(values, *values.shape, 4, reference.get_weight_perm(4))


def vllms_scales(scales: Tensor, group: int) -> Tensor:
    reference = pytest.importorskip("vllm.model_executor.layers.quantization.utils.marlin_utils")
    n, n_groups = scales.shape
    return reference.marlin_permute_scales(scales.t().contiguous(), n_groups * group, n, group)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_order_is_vllms(n: int, k: int, module: Any, device: str) -> None:
    codes = words(n, k // 8)
    packed = module.pack(codes.to(device))
    assert packed.shape == (k // 16, 2 * n) and packed.is_contiguous()
    assert torch.equal(packed.cpu(), vllms(codes))
    assert torch.equal(module.unpack(packed).cpu(), codes)


@pytest.mark.parametrize("shape", [(3, 64, 6), (5, 128, 34), (2, 3, 64, 4), (1, 64, 2)])
def test_experts_are_matrices_one_after_another(shape: tuple[int, ...], module: Any, device: str) -> None:
    codes = words(*shape).to(device)
    packed = module.pack(codes)
    assert packed.shape == (*shape[:-2], shape[-1] // 2, 2 * shape[-2])
    for one, its in zip(codes.flatten(0, -3), packed.flatten(0, -3), strict=True):
        assert torch.equal(its, marlin.pack(one))
    assert torch.equal(module.unpack(packed), codes)


def test_every_nibble_goes_where_the_formula_says(module: Any, device: str) -> None:
    """One of 15 in each of 64 experts, at 64 of the 1024 places of a tile; others in the next run."""
    expert, place = torch.arange(64), torch.randperm(1024)[:64]
    k, n = place // 64, place % 64
    codes, expected = torch.zeros(64, 128, 4, dtype=torch.int64), torch.zeros(64, 2, 256, dtype=torch.int64)
    codes[expert, 64 + n, 2 + k // 8] = 15 << (4 * (k % 8))
    column, half, j = n % 8, n // 8 % 2, n // 16
    odd, c, part = k % 2, k // 2 % 4, k // 8
    expected[expert, 1, 128 + 4 * (4 * column + c) + j] = 15 << (4 * (4 * odd + 2 * half + part))
    assert torch.equal(module.pack(codes.to(device, torch.int32)).cpu(), expected.to(torch.int32))


@pytest.mark.parametrize("shape", [(0, 64, 4), (2, 0, 4), (2, 64, 0), (0, 4)])
def test_nothing(shape: tuple[int, ...], module: Any, device: str) -> None:
    packed = module.pack(words(*shape).to(device))
    assert packed.shape == (*shape[:-2], shape[-1] // 2, 2 * shape[-2]) and packed.dtype == torch.int32
    assert module.unpack(packed).shape == shape


@pytest.mark.parametrize("shape", [(32, 4), (96, 4), (64, 3), (2, 72, 4), (2, 64, 1)])
def test_a_matrix_that_is_not_whole_tiles_is_refused(shape: tuple[int, ...], module: Any, device: str) -> None:
    with pytest.raises(ValueError, match=f"N {shape[-2]}, K {8 * shape[-1]}"):
        module.pack(words(*shape).to(device))
    with pytest.raises(ValueError, match="int8"):
        module.pack(torch.zeros(64, 16, dtype=torch.int8, device=device))
    with pytest.raises(ValueError, match="192 words"):
        module.unpack(words(2, 192).to(device))


def test_any_strides(module: Any, device: str) -> None:
    buffer = words(3, 128, 12).to(device)
    for view in (buffer[:, ::2, 1:9], buffer[::2, 64:], buffer[0].t().expand(3, 12, 128).transpose(1, 2)):
        assert torch.equal(module.pack(view), marlin.pack(view.clone()))
    packed = words(3, 4, 512).to(device)[:, ::2, 128:256]
    assert torch.equal(module.unpack(packed), marlin.unpack(packed.clone()))


def test_it_writes_to_out_and_nowhere_else(module: Any, device: str) -> None:
    codes = words(2, 64, 38).to(device)
    buffer = torch.full((4, 19, 128), 77, dtype=torch.int32, device=device)
    assert module.pack(codes, out=buffer[1:3]).data_ptr() == buffer[1].data_ptr()
    assert torch.equal(buffer[1:3], marlin.pack(codes))
    assert (buffer[0] == 77).all() and (buffer[3] == 77).all()


def test_another_out_is_refused(module: Any, device: str) -> None:
    codes = words(2, 64, 4).to(device)
    for out in (
        torch.empty(2, 128, 2, dtype=torch.int32, device=device),
        torch.empty(2, 2, 128, dtype=torch.int64, device=device),
        torch.empty(2, 128, 2, dtype=torch.int32, device=device).transpose(1, 2),
        torch.empty(2, 2, 128, dtype=torch.int32, device="meta"),
    ):
        with pytest.raises(ValueError, match="`out` is to be contiguous"):
            module.pack(codes, out=out)


def test_the_inverse_kernel_writes_nothing_beyond_its_output(device: str) -> None:
    packed = words(3, 128).to(device)  # three tiles: no multiple of a program's 16
    codes = torch.full((3, 64, 6), 77, dtype=torch.int32, device=device)
    marlin_fused._launch(marlin_fused._unpack_kernel, packed, codes[1], 1, 3)
    assert torch.equal(codes[1], marlin.unpack(packed))
    assert (codes[0] == 77).all() and (codes[2] == 77).all()


@pytest.mark.parametrize("shape", [(64, 16), (128, 48), (3, 192, 272), (2, 64, 528), (0, 64, 16)])
def test_the_checksum_of_packed_codes_is_that_of_the_codes(shape: tuple[int, ...], device: str) -> None:
    codes = words(*shape[:-1], shape[-1] // 8).to(device)
    packed = marlin_fused.pack(codes)
    assert marlin_fused.pending_checksum(packed).item() == pending(codes.cpu()).item()
    if packed.numel():
        packed.view(-1)[-1] ^= 1 << 30
        assert marlin_fused.pending_checksum(packed).item() != pending(codes.cpu()).item()


@pytest.mark.parametrize("n", [64, 128, 320])
@pytest.mark.parametrize("n_groups", [1, 2, 7, 16])
def test_scales_are_in_vllms_order(n: int, n_groups: int, device: str) -> None:
    scales = torch.randn(n, n_groups).bfloat16()
    packed = marlin.pack_scales(scales.to(device))
    assert packed.is_contiguous() and torch.equal(packed.cpu(), vllms_scales(scales, 128))
    assert torch.equal(marlin.unpack_scales(packed).cpu(), scales)


@pytest.mark.parametrize("n_groups", [1, 3])
def test_scales_of_experts(n_groups: int, device: str) -> None:
    scales = torch.randn(5, 128, n_groups, device=device).bfloat16()
    buffer = torch.full((7, n_groups, 128), 77.0, device=device).bfloat16()
    packed = marlin.pack_scales(scales, out=buffer[1:-1])
    assert packed.data_ptr() == buffer[1].data_ptr() and (buffer[0] == 77).all() and (buffer[-1] == 77).all()
    for one, its in zip(scales, packed, strict=True):
        assert torch.equal(its.cpu(), vllms_scales(one.cpu(), 32))
    assert torch.equal(marlin.unpack_scales(packed), scales)
    strided = scales.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(marlin.pack_scales(strided), packed)


def test_scales_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="in 64s"):
        marlin.pack_scales(torch.ones(96, 2).bfloat16())
    with pytest.raises(ValueError, match="in 64s"):
        marlin.unpack_scales(torch.ones(1, 32).bfloat16())
    with pytest.raises(ValueError, match="`out` is to be contiguous"):
        marlin.pack_scales(torch.ones(64, 2).bfloat16(), out=torch.ones(64, 2).bfloat16())


@pytest.mark.parametrize("shape", [(0, 64, 3), (0, 64, 1), (2, 0, 3), (64, 0)])
def test_no_scales(shape: tuple[int, ...]) -> None:
    packed = marlin.pack_scales(torch.ones(shape).bfloat16())
    assert packed.shape == (*shape[:-2], shape[-1], shape[-2])
    assert marlin.unpack_scales(packed).shape == shape


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(64, 16), (5120, 2048), (2048, 2064), (24576, 4096), (128, 1536, 2048), (128, 2048, 768)]
)
def test_the_engines_own_kernel(shape: tuple[int, ...]) -> None:
    ops = pytest.importorskip("vllm._custom_ops")
    codes = torch.randint(-(2**31), 2**31, (*shape[:-1], shape[-1] // 8), dtype=torch.int32, device="cuda")
    packed = marlin_fused.pack(codes)
    assert torch.equal(marlin_fused.unpack(packed), codes)
    n, k = shape[-2:]
    no_order = torch.empty(0, dtype=torch.int32, device="cuda")
    for one, its in zip(codes.view(-1, n, k // 8), packed.view(-1, k // 16, 2 * n), strict=True):
        assert torch.equal(ops.gptq_marlin_repack(one.t().contiguous(), no_order, k, n, 4, is_a_8bit=False), its)


@pytest.mark.gpu
def test_more_than_two_to_the_31_words() -> None:
    codes = torch.randint(-(2**31), 2**31, (2**14 + 1, 1088, 128), dtype=torch.int32, device="cuda")
    packed = marlin_fused.pack(codes)
    assert torch.equal(packed[-2:], marlin.pack(codes[-2:]))
    assert torch.equal(marlin_fused.unpack(packed), codes)
