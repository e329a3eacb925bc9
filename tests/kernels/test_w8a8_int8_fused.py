"""int8 by Triton: codes, products and experts against the definition, bit for bit. (The sums alone: test_products_fused.)"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qarl.kernels import w8a8_int8
from qarl.kernels import w8a8_int8_fused as fused
from qarl.kernels.rows_fused import dequantize_rows, quantize_rows

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy in the interpreter: 127 / 0


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def hostile_rows(k: int, device: str) -> Tensor:
    """bfloat16 rows: normal, zero, ties, an outlier, inf, -inf, NaN, denormals, the largest, and each next to a good one."""
    x = torch.randn(18, k)
    x[2] = 0
    x[4] = torch.arange(k) % 90 / 2
    x[4, 0] = 127
    x[6, k // 2], x[6, 0] = 65504, -65504
    x[8, 0], x[10, k - 1], x[12, k // 3] = float("inf"), float("-inf"), float("nan")
    x[14] = torch.tensor([1e-40, -1e-40, 0, 0]).repeat(k)[:k]
    x[15] *= 1e-38
    x[16] = torch.finfo(torch.bfloat16).max
    return x.bfloat16().to(device)


@pytest.mark.parametrize("k", [1, 16, 33, 768, 4096, 12280])
def test_weight_equals_the_definition(k: int, device: str) -> None:
    weight = hostile_rows(k, device)
    ours, expected = fused.quantize(weight), w8a8_int8.quantize(weight)
    finite = weight.isfinite().all(-1)
    assert torch.equal(ours["weight"][finite], expected["weight"][finite])
    assert torch.equal(ours["weight_scale"].nan_to_num(-1), expected["weight_scale"].nan_to_num(-1))
    assert not fused.dequantize(ours, None, torch.float32)[~finite].isfinite().any()
    expected_weight = w8a8_int8.dequantize(expected, None, torch.float32)
    assert torch.equal(fused.dequantize(ours, None, torch.float32)[finite], expected_weight[finite])


@pytest.mark.parametrize("scale", [1.0, 2.0**60, 2.0**-60, 2.0**-73, 2.0**-79, 2.0**-90, 2.0**-118])
def test_every_quotient_of_two_bfloat16_gives_the_definitions_code(scale: float, device: str) -> None:
    """All 128 mantissas of the absmax against all of the value, over all exponents that give a code: the fused division
    is right everywhere, since a power of two changes nothing but near the ends of the range."""
    mantissa = 1 + torch.arange(128) / 128
    values = torch.cat([mantissa * 2.0**e for e in range(-9, 1)])
    absmax = mantissa[:, None]
    weight = torch.cat([absmax, torch.where(values <= absmax, values, -absmax)], dim=1)
    weight = (weight * scale).bfloat16().to(device)
    ours, expected = fused.quantize(weight), w8a8_int8.quantize(weight)
    assert torch.equal(ours["weight"], expected["weight"])
    assert torch.equal(ours["weight_scale"], expected["weight_scale"])


def test_rows_longer_than_the_registers_hold(device: str) -> None:
    weight = torch.randn(3, 16384 + 40, device=device).bfloat16()
    ours, expected = fused.quantize(weight), w8a8_int8.quantize(weight)
    assert torch.equal(ours["weight"], expected["weight"])
    assert torch.equal(ours["weight_scale"], expected["weight_scale"])
    back = w8a8_int8.dequantize(expected, None, torch.float32)
    assert torch.equal(fused.dequantize(ours, None, torch.float32), back)


def test_experts_weights_and_views_keep_their_shape(device: str) -> None:
    weight = torch.randn(5, 40, 6, device=device).bfloat16().transpose(-1, -2)
    ours, expected = fused.quantize(weight), w8a8_int8.quantize(weight)
    assert ours["weight"].shape == (5, 6, 40) and ours["weight_scale"].shape == (5, 6, 1)
    assert torch.equal(ours["weight"], expected["weight"])
    with pytest.raises(ValueError, match="no groups"):
        fused.quantize(weight, 32)


@pytest.mark.parametrize("k", [1, 33, 512])
def test_tokens_follow_vllms_cuda_rule(k: int, device: str) -> None:
    """Written down anew, in float32: code = rint(x · (127 / absmax)), ties to even; NaN is 0."""
    x = hostile_rows(k, device)
    codes, scale = fused.quantize_tokens(x)
    absmax = x.float().abs().amax(-1, keepdim=True)
    limit = torch.tensor(127.0, device=device)
    assert torch.equal(scale.nan_to_num(-1), (absmax / limit).nan_to_num(-1))
    inverse = torch.where(absmax == 0, 0, limit / absmax)
    expected = (x.float() * inverse).round().clamp(-128, 127).nan_to_num(0).to(torch.int8)
    assert torch.equal(codes, expected)


def test_no_rows(device: str) -> None:
    operand = fused.prepare(w8a8_int8.quantize(torch.randn(8, 16, device=device)), None, torch.bfloat16)
    assert fused.product(torch.empty(0, 16, device=device).bfloat16(), operand).shape == (0, 8)
    experts = fused.prepare(w8a8_int8.quantize(torch.randn(3, 8, 16, device=device)), None, torch.bfloat16)
    nowhere = torch.zeros(3, dtype=torch.int32, device=device)
    assert fused.grouped_product(torch.empty(0, 16, device=device).bfloat16(), experts, nowhere).shape == (0, 8)


def test_rows_that_are_not_finite_touch_no_other_row(device: str) -> None:
    x = hostile_rows(64, device)
    bad = ~x.isfinite().all(-1)
    clean = torch.where(bad[:, None], torch.zeros_like(x), x)
    weight = torch.randn(2, 24, 64, device=device)
    matrix, experts = (fused.prepare(w8a8_int8.quantize(w), None, torch.bfloat16) for w in (weight[0], weight))
    offsets = torch.tensor([9, 18], device=device)
    for y, expected in (
        (fused.product(x, matrix), fused.product(clean, matrix)),
        (fused.grouped_product(x, experts, offsets), fused.grouped_product(clean, experts, offsets)),
    ):
        assert not y[bad].isfinite().any()
        assert torch.equal(y[~bad], expected[~bad])


def test_prepare_keeps_no_copy(device: str) -> None:
    codes = w8a8_int8.quantize(torch.randn(4, 24, 64, device=device))
    operand = fused.prepare(codes, None, torch.bfloat16)
    assert operand.codes.data_ptr() == codes["weight"].data_ptr()


def test_it_is_refused_where_it_does_not_run() -> None:
    assert "cuda only" in str(fused.refusal("cpu", torch.bfloat16))
    assert fused.refusal("cuda", torch.float32) is not None


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(24576, 4096), (128, 1536, 2048), (128, 2048, 768), (512, 12288), (64, 20000), (7, 17)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_true_weights_equal_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, device="cuda", dtype=dtype)
    ours, expected = fused.quantize(weight), w8a8_int8.quantize(weight)
    assert torch.equal(ours["weight"], expected["weight"])
    assert torch.equal(ours["weight_scale"], expected["weight_scale"])
    back = w8a8_int8.dequantize(expected, None, torch.bfloat16)
    assert torch.equal(fused.dequantize(ours, None, torch.bfloat16), back)
    on_cpu = w8a8_int8.quantize(weight.flatten(0, -2)[:100].cpu())
    assert torch.equal(ours["weight"].flatten(0, -2)[:100].cpu(), on_cpu["weight"])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(1, 4096, 4096), (65, 6144, 4096), (300, 24576, 4096), (4096, 6144, 4096), (2048, 4096, 12288)]
)
@pytest.mark.parametrize("biased", [False, True])
def test_true_products_equal_the_definition(shape: tuple[int, int, int], biased: bool) -> None:
    m, n, k = shape
    weight, x = torch.randn(n, k, device="cuda").bfloat16(), torch.randn(m, k, device="cuda").bfloat16()
    bias = torch.randn(n, device="cuda").bfloat16() if biased else None
    codes = w8a8_int8.quantize(weight)
    y = fused.product(x, fused.prepare(codes, None, torch.bfloat16), bias)
    assert torch.equal(y, w8a8_int8.product(x, w8a8_int8.prepare(codes, None, torch.bfloat16), bias))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1536, 2048), (2048, 768)])
@pytest.mark.parametrize("m", [128, 8192])
def test_true_experts(shape: tuple[int, int], m: int) -> None:
    n, k = shape
    weight = fused.quantize(torch.randn(128, n, k, device="cuda"))
    counts = torch.randint(0, 2 * m // 128, (128,), device="cuda")
    counts[5], counts[77] = 0, 300
    offsets = counts.cumsum(0)
    x = torch.randn(int(offsets[-1]) + 33, k, device="cuda").bfloat16()
    row_weights = torch.rand(len(x), device="cuda")
    y = fused.grouped_product(x, fused.prepare(weight, None, torch.bfloat16), offsets, row_weights)
    assert torch.equal(y, w8a8_int8.grouped_product(x, weight, offsets, row_weights))


@pytest.mark.gpu
def test_experts_do_not_wait_for_the_device() -> None:
    operand = fused.prepare(fused.quantize(torch.randn(4, 64, 64, device="cuda")), None, torch.bfloat16)
    x, offsets = torch.randn(100, 64, device="cuda").bfloat16(), torch.tensor([10, 20, 90, 95], device="cuda")
    fused.grouped_product(x, operand, offsets)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused.grouped_product(x, operand, offsets)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_rows_beyond_two_to_the_31_elements() -> None:
    x = torch.randn(140000, 16384, device="cuda", dtype=torch.bfloat16)
    codes, scale = quantize_rows(x, "int8 tokens")
    last = fused.quantize_tokens(x[-3:].clone())
    assert torch.equal(codes[-3:], last[0]) and torch.equal(scale[-3:], last[1])
    back = dequantize_rows(codes, scale, torch.bfloat16)
    assert torch.equal(back[-3:], dequantize_rows(*last, torch.bfloat16))
