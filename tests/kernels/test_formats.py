"""What every format's definition promises, on the same cases. The reference for codes is the library compressed-tensors.

Tolerances of `emulated` against float64, relative to Σ|x·w| of an output:
    w8a8_int8   2^-22        the sum is exact; its conversion and two scales are one rounding each
    w8a8_fp8    K · 2^-24    float32 summation in any order
    w4a16       K · 2^-24    likewise
"""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qarl.formats import FORMATS
from qarl.kernels.dispatch import Codes, load

QUANTIZED = [name for name, format in FORMATS.items() if format.quantizes]
K = 256
SHAPES = [(1, K), (3, K), (7, 3 * K), (48, K)]


def group_of(name: str) -> int | None:
    return FORMATS[name].group


def quantize(name: str, weight: Tensor) -> Codes:
    return load(name, "emulated").quantize(weight, group_of(name))


def dequantize(name: str, codes: Codes, dtype: torch.dtype = torch.float32) -> Tensor:
    return load(name, "emulated").dequantize(codes, group_of(name), dtype)


def product(name: str, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    module = load(name, "emulated")
    return module.product(x, module.prepare(quantize(name, weight), group_of(name), x.dtype), bias)


def compressor(name: str) -> tuple[type[BaseCompressor], QuantizationScheme]:
    """The library's compressor of a format, with the scheme that an exported checkpoint names."""
    channel = {"strategy": "channel", "symmetric": True}
    token = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}
    kind, weights, inputs = {
        "w8a8_int8": ("int-quantized", {"num_bits": 8, "type": "int", **channel}, {"type": "int", **token}),
        "w8a8_fp8": ("float-quantized", {"num_bits": 8, "type": "float", **channel}, {"type": "float", **token}),
    }.get(name, ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": group_of(name)}, None))
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs.model_validate(weights),
        input_activations=inputs and QuantizationArgs.model_validate(inputs),
    )
    return BaseCompressor.get_value_from_registry(kind), scheme


def hostile_weight(n: int = 16, k: int = K) -> Tensor:
    """Rows of many magnitudes: normal, zero, denormal, outlier, one-sided, constant."""
    weight = torch.randn(n, k)
    weight[1] = 0
    weight[2] *= 1e-40
    weight[3, 5] = 65504
    weight[4] = weight[4].abs()
    weight[5] = -0.37
    weight[6, k // 2 :] = 0
    weight[7] *= 1e30
    return weight


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("weight", [torch.randn(24, K), hostile_weight()], ids=["normal", "hostile"])
def test_codes_are_those_of_compressed_tensors_given_our_scale(name: str, weight: Tensor) -> None:
    codes = quantize(name, weight)
    library, scheme = compressor(name)
    state = {"weight": weight.bfloat16(), "weight_scale": codes["weight_scale"]}
    theirs = library.compress(state, scheme)
    for part, ours in codes.items():
        assert ours.dtype == theirs[part].dtype
        assert torch.equal(ours.view(torch.uint8), theirs[part].view(torch.uint8)), part


@pytest.mark.parametrize("name", QUANTIZED)
def test_dequantized_weights_are_those_of_compressed_tensors(name: str) -> None:
    weight = hostile_weight()
    codes = quantize(name, weight)
    library, scheme = compressor(name)
    theirs = library.decompress({**codes, "weight_shape": torch.tensor(weight.shape)}, scheme)["weight"]
    assert torch.equal(dequantize(name, codes, theirs.dtype), theirs)


@pytest.mark.parametrize("name", ["w8a8_fp8", "w4a16", "w4a16_g32"])
def test_scales_are_those_of_compressed_tensors(name: str) -> None:
    """int8 is left out: the library divides by 127.5 and uses -128; the format's rule is absmax/127."""
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = torch.randn(24, K).bfloat16()
    source = weight.float() if name == "w8a8_fp8" else weight
    groups = source.unflatten(-1, (K // (group_of(name) or K), -1))
    args = compressor(name)[1].weights
    theirs, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    assert torch.equal(quantize(name, weight)["weight_scale"], theirs)


@pytest.mark.parametrize("name", QUANTIZED)
def test_source_is_the_bfloat16_weight(name: str) -> None:
    weight = torch.randn(8, K)
    ours, cast = quantize(name, weight), quantize(name, weight.bfloat16())
    assert all(torch.equal(ours[part].view(torch.uint8), cast[part].view(torch.uint8)) for part in ours)


@pytest.mark.parametrize("name", QUANTIZED)
def test_packed_experts_are_stacked_matrices(name: str) -> None:
    weight = torch.stack([hostile_weight(), torch.randn(16, K), torch.zeros(16, K)])
    packed = quantize(name, weight)
    for e in range(3):
        single = quantize(name, weight[e])
        for part, tensor in single.items():
            assert torch.equal(packed[part][e].view(torch.uint8), tensor.view(torch.uint8))
        assert torch.equal(dequantize(name, packed)[e], dequantize(name, single))


@pytest.mark.parametrize("name", QUANTIZED)
def test_dequantized_weight_is_within_half_a_step(name: str) -> None:
    """Half a step of the grid: of the scale for integers (one step at +absmax, where int4 cuts 7.5 to 7); of e4m3's 3-bit
    mantissa, or its smallest spacing 2^-9, for fp8. Scale and product round: in float32 by 2^-22, in bfloat16 by 2^-7."""
    weight = torch.randn(24, K).bfloat16().float()
    codes = quantize(name, weight)
    error = (dequantize(name, codes) - weight).abs()
    scale = codes["weight_scale"].float().repeat_interleave(K // codes["weight_scale"].shape[-1], -1)
    if name == "w8a8_fp8":
        bound = torch.maximum(weight.abs() / 16, scale * 2**-10)
    elif name == "w8a8_int8":
        bound = scale / 2 + weight.abs() * 2**-22
    else:
        bound = torch.where(weight > 6.5 * scale, scale, scale / 2) + weight.abs() * 2**-7
    assert (error <= bound * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", QUANTIZED)
def test_zero_rows_and_groups_stay_zero(name: str) -> None:
    weight = torch.randn(4, K)
    weight[1] = 0
    weight[2, :128] = 0
    grid = dequantize(name, quantize(name, weight))
    assert grid.isfinite().all()
    assert not grid[1].any() and not grid[2, :128].any()
    assert grid[0].any()


@pytest.mark.parametrize("name", QUANTIZED)
def test_denormal_and_huge_weights_stay_on_the_grid(name: str) -> None:
    """Half a step of one scale is 1/14 of the absmax for int4; a scale that underflows bfloat16 makes the group zero."""
    weight = hostile_weight()
    grid = dequantize(name, quantize(name, weight))
    assert grid.isfinite().all()
    for row in (3, 7):
        assert torch.allclose(grid[row], weight[row], rtol=0.1, atol=float(weight[row].abs().max()) / 14)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_weights_show_in_their_row_only(name: str, value: float) -> None:
    weight = torch.randn(4, K)
    clean = dequantize(name, quantize(name, weight))
    weight[2, 3] = value
    grid = dequantize(name, quantize(name, weight))
    assert not grid[2].isfinite().all()
    keep = [0, 1, 3]
    assert torch.equal(grid[keep], clean[keep])


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("m", [0, 1, 3, 17])
@pytest.mark.parametrize("biased", [False, True])
def test_emulated_product_against_float64(name: str, shape: tuple[int, int], m: int, biased: bool) -> None:
    weight, x = torch.randn(shape), torch.randn(m, shape[1])
    bias = torch.randn(shape[0]) if biased else None
    inputs = x.double()
    if hasattr(load(name, "emulated"), "quantize_tokens"):
        codes, scale = load(name, "emulated").quantize_tokens(x)  # type: ignore[attr-defined]
        inputs = codes.double() * scale.double()
    grid = quantize(name, weight)
    grid64 = (
        grid["weight"].double() * grid["weight_scale"].double() if "weight" in grid else dequantize(name, grid).double()
    )
    expected = inputs @ grid64.t() + (0 if bias is None else bias.double())
    unit = inputs.abs() @ grid64.abs().t() + (0 if bias is None else bias.double().abs())
    y = product(name, x, weight, bias)
    assert y.shape == (m, shape[0]) and y.dtype == torch.float32
    tolerance = 2**-22 if name == "w8a8_int8" else shape[1] * 2**-24
    assert ((y.double() - expected).abs() <= tolerance * unit).all()


@pytest.mark.parametrize("name", QUANTIZED)
def test_bfloat16_product_is_the_float32_one_rounded_once(name: str) -> None:
    """Up to summation order for w4a16, whose product runs in bfloat16 itself: one unit of its last place, 2^-7."""
    x, weight = torch.randn(9, K).bfloat16(), torch.randn(24, K)
    low, high = product(name, x, weight), product(name, x.float(), weight)
    assert low.dtype == torch.bfloat16
    if name.startswith("w8a8"):
        assert torch.equal(low, high.bfloat16())
    else:
        assert torch.allclose(low.float(), high, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("name", QUANTIZED)
def test_rows_do_not_depend_on_their_batch(name: str) -> None:
    """Exact where the sum is; float32 sums may change their order with the number of rows."""
    x, weight = torch.randn(33, K), torch.randn(24, K)
    together, alone = product(name, x, weight), torch.cat([product(name, row[None], weight) for row in x])
    if name == "w8a8_int8":
        assert torch.equal(together, alone)
    else:
        assert torch.allclose(together, alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nonfinite_inputs_show_in_their_row_only(name: str, value: float) -> None:
    x, weight = torch.randn(4, K), torch.randn(24, K)
    clean = product(name, x, weight)
    x[2, 3] = value
    y = product(name, x, weight)
    assert not y[2].isfinite().any()
    keep = [0, 1, 3]
    assert torch.equal(y[keep], clean[keep])


@pytest.mark.parametrize("name", QUANTIZED)
def test_zero_denormal_and_outlier_inputs(name: str) -> None:
    x, weight = torch.randn(4, K), torch.randn(24, K)
    x[0] = 0
    x[1] *= 1e-40
    x[2, 7] = 65504
    y = product(name, x, weight)
    assert y.isfinite().all()
    assert not y[0].any()
    assert y[1].abs().max() < 1e-36
    # The outlier alone decides its row; what else is in it lies below half a step of 8 bits, or is small beside it.
    assert torch.allclose(y[2], 65504 * weight[:, 7], rtol=0.2, atol=65504 * 0.1)


@pytest.mark.parametrize("name", QUANTIZED)
def test_non_contiguous_inputs_and_weights(name: str) -> None:
    x, weight = torch.randn(K, 5).t(), torch.randn(K, 24).t()
    y, expected = product(name, x, weight), product(name, x.contiguous(), weight.contiguous())
    if name == "w8a8_int8":
        assert torch.equal(y, expected)  # integers
    else:  # float32 sums of K terms, |y| below 50, in an order that depends on layout and threads
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["w8a8_int8", "w8a8_fp8"])
def test_a_group_is_refused_where_scales_cover_channels(name: str) -> None:
    with pytest.raises(ValueError, match="no groups; got group 32"):
        load(name, "emulated").quantize(torch.randn(4, K), 32)


@pytest.mark.parametrize("name", QUANTIZED)
@given(st.integers(0, 2**32), st.integers(-40, 30))
@settings(max_examples=25, deadline=None)
def test_quantizing_is_homogeneous_in_powers_of_two(name: str, seed: int, power: int) -> None:
    """Scaling a weight by 2^n scales the scale and changes no code (exact in binary floating point)."""
    weight = torch.randn(2, K, generator=torch.Generator().manual_seed(seed)).bfloat16().float()
    codes, scaled = quantize(name, weight), quantize(name, weight * 2.0**power)
    assert torch.equal(scaled["weight_scale"].float(), codes["weight_scale"].float() * 2.0**power)
    part = "weight_packed" if "weight_packed" in codes else "weight"
    assert torch.equal(codes[part].view(torch.uint8), scaled[part].view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("name", QUANTIZED)
def test_codes_do_not_depend_on_the_device(name: str) -> None:
    weight = torch.cat([hostile_weight(), torch.randn(512, K)])
    weight[8, 3], weight[9, 3] = float("nan"), float("inf")
    for part, here in quantize(name, weight).items():
        there = quantize(name, weight.cuda())[part].cpu()
        assert torch.equal(here.view(torch.uint8), there.view(torch.uint8)) or torch.equal(
            here.float().nan_to_num(7), there.float().nan_to_num(7)
        ), part
    codes = quantize(name, weight)
    on_gpu = dequantize(name, {part: tensor.cuda() for part, tensor in codes.items()}).cpu()
    assert torch.equal(dequantize(name, codes).nan_to_num(7), on_gpu.nan_to_num(7))


@pytest.mark.gpu
@pytest.mark.parametrize("m", [0, 1, 3, 17])
def test_the_integer_sum_is_exact_on_a_gpu(m: int) -> None:
    """At shapes that torch._int_mm refuses, and sums beyond 2^24; TF32 may be switched on."""
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        for k in (33, 1040, 4100):
            codes = {"weight": torch.randint(120, 128, (7, k), dtype=torch.int8), "weight_scale": torch.ones(7, 1)}
            x = torch.randint(120, 128, (m, k))
            x[:, 0] = 127
            expected = (x @ codes["weight"].long().t()).float()
            there = {part: tensor.cuda() for part, tensor in codes.items()}
            assert torch.equal(load("w8a8_int8", "emulated").product(x.float().cuda(), there).cpu(), expected)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
