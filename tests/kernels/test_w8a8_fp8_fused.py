"""e4m3 by Triton and torch: codes against the definition, products against float64 (and vLLM's: test_w8a8_engines).

Triton's interpreter does not round to e4m3 as the hardware does (half to even), so codes are compared on a GPU; without
one: scales, layouts, values that e4m3 holds exactly, and the quotients that are rounded.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from qarl.kernels import rows_fused, w8a8_fp8
from qarl.kernels import w8a8_fp8_fused as fused

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def hostile_rows(k: int, device: str) -> Tensor:
    """bfloat16 rows: normal, zero, an outlier, inf, -inf, NaN, denormals, the largest, and each next to a good one."""
    x = torch.randn(18, k)
    x[2] = 0
    x[6, k // 2], x[6, 0] = 65504, -65504
    x[8, 0], x[10, k - 1], x[12, k // 3] = float("inf"), float("-inf"), float("nan")
    x[14] = torch.tensor([1e-40, -1e-40, 0, 0]).repeat(k)[:k]
    x[15] *= 1e-38
    x[16] = torch.finfo(torch.bfloat16).max
    return x.bfloat16().to(device)


def assert_same_codes(ours: Tensor, expected: Tensor) -> None:
    """Bit for bit; a NaN has two codes, of which each device takes one."""
    nan = expected.float().isnan()
    assert torch.equal(ours.float().isnan(), nan)
    assert torch.equal(ours.view(torch.uint8)[~nan], expected.view(torch.uint8)[~nan])


def allowed(codes: Tensor, scale: Tensor, weight: w8a8_fp8.Codes) -> tuple[Tensor, Tensor]:
    """The product in float64, and how far a tensor core may be from it: half a unit of bfloat16, and 2^-11 of the sum of
    magnitudes (it keeps 13 bits after the largest term of each step of 32)."""
    x = codes.double() * scale.double()
    w = weight["weight"].double() * weight["weight_scale"].double()
    exact = x @ w.t()
    return exact, 2**-8 * exact.abs() + 2**-11 * (x.abs() @ w.abs().t())


@triton.jit
def _quotients(value_ptr, scale_ptr, out_ptr, k, BLOCK: tl.constexpr):
    row = tl.program_id(0) + tl.arange(0, 1)
    column = tl.arange(0, BLOCK)
    at = row[:, None] * k + column[None, :]
    inside = (column < k)[None, :]
    value = tl.load(value_ptr + at, mask=inside, other=0.0)
    quotient = rows_fused._divide(value, tl.load(scale_ptr + row)[:, None])
    tl.store(out_ptr + at, quotient, mask=inside)


@pytest.mark.parametrize("power", [0, 60, -60, -71, -90, -118])
def test_every_quotient_of_two_bfloat16_is_rounded_correctly(power: int, device: str) -> None:
    """All mantissas of the absmax against all of the value, over the exponents whose quotient e4m3 does not lose. Near
    the end of the range, where small values are no longer bfloat16 exactly, over all that are."""
    mantissa = 1 + torch.arange(128) / 128
    values = torch.cat([mantissa * 2.0**e for e in range(-20, 1)]).expand(128, -1)
    values = (values * 2.0**power).bfloat16().float().contiguous().to(device)
    absmax = (mantissa[:, None] * 2.0**power).bfloat16().float().to(device)
    scale = absmax / torch.tensor(448.0, device=device)
    out = torch.empty_like(values)
    _quotients[(128,)](values, scale, out, values.shape[1], triton.next_power_of_2(values.shape[1]))
    assert torch.equal(out, values / scale)


@pytest.mark.parametrize("k", [1, 33, 768])
def test_scales_equal_the_definition(k: int, device: str) -> None:
    x = hostile_rows(k, device)
    ours, expected = fused.quantize(x), w8a8_fp8.quantize(x)
    assert torch.equal(ours["weight_scale"].nan_to_num(-1), expected["weight_scale"].nan_to_num(-1))
    assert torch.equal(fused.quantize_tokens(x)[1].nan_to_num(-1), w8a8_fp8.quantize_tokens(x)[1].nan_to_num(-1))
    bad = ~x.isfinite().all(-1)
    assert not fused.dequantize(ours, None, torch.float32)[bad].isfinite().any()


def test_values_that_e4m3_holds_keep_their_bits(device: str) -> None:
    """All 254 finite codes in a row whose absmax is 448, so that its scale is 1."""
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8, device=device)
    values = codes.view(torch.float8_e4m3fn).to(torch.bfloat16)[None]
    assert_same_codes(fused.quantize(values)["weight"][0], codes.view(torch.float8_e4m3fn))
    assert_same_codes(fused.quantize_tokens(values)[0][0], codes.view(torch.float8_e4m3fn))


def test_dequantize_equals_the_definition(device: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    if device == "cpu":
        codes = codes[(codes & 0x7F) != 0x7F]  # the interpreter reads the codes of NaN as 480
    codes = codes.expand(3, -1).contiguous().view(torch.float8_e4m3fn)
    stored = {"weight": codes, "weight_scale": torch.rand(3, 1, device=device)}
    ours = fused.dequantize(stored, None, torch.float32)
    assert torch.equal(ours.nan_to_num(-1), w8a8_fp8.dequantize(stored, None, torch.float32).nan_to_num(-1))


@pytest.mark.parametrize("experts", [(), (2,)])
def test_prepare_pads_what_must_be_and_keeps_no_copy_where_it_need_not(experts: tuple[int, ...], device: str) -> None:
    """K to multiples of 16, and a matrix's N."""
    codes = w8a8_fp8.quantize(torch.randn(*experts, 48, 32, device=device))
    assert fused.prepare(codes, None, torch.bfloat16).codes.data_ptr() == codes["weight"].data_ptr()
    odd = w8a8_fp8.quantize(torch.randn(*experts, 33, 17, device=device))
    operand, n = fused.prepare(odd, None, torch.bfloat16), 33 if experts else 48
    assert operand.codes.shape == (*experts, n, 32) and operand.scale.shape == (*experts, n, 1) and operand.n == 33
    assert torch.equal(operand.codes[..., :33, :17].float(), odd["weight"].float())
    assert torch.equal(operand.scale[..., :33, :], odd["weight_scale"])


def test_it_is_refused_where_it_does_not_run() -> None:
    assert "cuda only" in str(fused.refusal("cpu", torch.bfloat16))
    assert fused.refusal("cuda", torch.float32) is not None
    with pytest.raises(ValueError, match="no groups"):
        fused.quantize(torch.randn(2, 32), 32)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 16, 33, 768, 4096, 12288, 20000])
def test_codes_equal_the_definition(k: int) -> None:
    x = torch.cat([hostile_rows(k, "cuda"), torch.randn(300, k, device="cuda").bfloat16()])
    assert_same_codes(fused.quantize(x)["weight"], w8a8_fp8.quantize(x)["weight"])
    assert_same_codes(fused.quantize_tokens(x)[0], w8a8_fp8.quantize_tokens(x)[0])
    assert_same_codes(fused.quantize(x)["weight"].cpu(), w8a8_fp8.quantize(x.cpu())["weight"])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(24576, 4096), (128, 1536, 2048), (128, 2048, 768)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_true_weights_equal_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, device="cuda", dtype=dtype)
    ours, expected = fused.quantize(weight), w8a8_fp8.quantize(weight)
    assert_same_codes(ours["weight"], expected["weight"])
    assert torch.equal(ours["weight_scale"], expected["weight_scale"])
    back = w8a8_fp8.dequantize(expected, None, torch.bfloat16)
    assert torch.equal(fused.dequantize(ours, None, torch.bfloat16), back)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(0, 32, 32), (1, 16, 16), (5, 33, 17), (70, 6144, 4096), (2048, 4096, 12288)])
@pytest.mark.parametrize("biased", [False, True])
def test_product_against_float64(shape: tuple[int, int, int], biased: bool) -> None:
    m, n, k = shape
    weight = fused.quantize(torch.randn(n, k, device="cuda"))
    x = torch.randn(m, k, device="cuda").bfloat16()
    bias = torch.randn(n, device="cuda").bfloat16() if biased else None
    y = fused.product(x, fused.prepare(weight, None, torch.bfloat16), bias)
    exact, tolerance = allowed(*fused.quantize_tokens(x), weight)
    if bias is not None:
        exact, tolerance = exact + bias.double(), tolerance + 2**-8 * (exact + bias.double()).abs()
    assert y.shape == (m, n) and y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= tolerance).all()


@pytest.mark.gpu
@pytest.mark.parametrize("offset_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("counts", "after"), [([3, 0, 5, 0], 2), ([0, 0, 0, 700], 0), ([300, 1, 0, 0, 90], 5), ([0, 0], 4), ([9], 0)]
)
@pytest.mark.parametrize("shape", [(33, 17), (1536, 2048)])
@pytest.mark.parametrize("weighted", [False, True])
def test_experts_against_float64(
    counts: list[int], after: int, shape: tuple[int, int], weighted: bool, offset_dtype: torch.dtype
) -> None:
    offsets = torch.tensor(counts, device="cuda").cumsum(0).to(offset_dtype)
    weight = fused.quantize(torch.randn(len(counts), *shape, device="cuda"))
    x = torch.randn(sum(counts) + after, shape[1], device="cuda").bfloat16()
    x[sum(counts) :] = float("nan")
    row_weights = torch.rand(len(x), device="cuda") if weighted else None
    y = fused.grouped_product(x, fused.prepare(weight, None, torch.bfloat16), offsets, row_weights)
    codes, scale = fused.quantize_tokens(x)
    scale = scale if row_weights is None else scale * row_weights[:, None]
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        mine = {part: tensor[expert] for part, tensor in weight.items()}
        exact, tolerance = allowed(codes[start:end], scale[start:end], mine)
        assert ((y[start:end].double() - exact).abs() <= tolerance).all()
        start = end
    assert y.shape == (len(x), shape[0]) and not y[start:].any()


@pytest.mark.gpu
def test_rows_that_are_not_finite_touch_no_other_row() -> None:
    x = hostile_rows(64, "cuda")
    bad = ~x.isfinite().all(-1)
    clean = torch.where(bad[:, None], torch.zeros_like(x), x)
    weight = torch.randn(2, 32, 64, device="cuda")
    matrix, experts = (fused.prepare(fused.quantize(w), None, torch.bfloat16) for w in (weight[0], weight))
    offsets = torch.tensor([9, 18], device="cuda")
    for y, expected in (
        (fused.product(x, matrix), fused.product(clean, matrix)),
        (fused.grouped_product(x, experts, offsets), fused.grouped_product(clean, experts, offsets)),
    ):
        assert not y[bad].isfinite().any()
        assert torch.equal(y[~bad], expected[~bad])


@pytest.mark.gpu
def test_experts_do_not_wait_for_the_device() -> None:
    operand = fused.prepare(fused.quantize(torch.randn(4, 64, 64, device="cuda")), None, torch.bfloat16)
    x, offsets = torch.randn(100, 64, device="cuda").bfloat16(), torch.tensor([10, 20, 90, 95], device="cuda")
    fused.grouped_product(x, operand, offsets)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused.grouped_product(x, operand, offsets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
