"""int8: tokens as vLLM's op quantizes them, the exact integer sum, and the engine backend against both.

`engine` against `emulated`. The integer sum is exact in both where the CPU has VNNI; the epilogue is vLLM's own code, of
which it ships three builds (all three were compared, on one machine):
    AVX512_BF16     equal bit for bit
    AVX512, AVX2    float32: 2^-22 of |y| + |bias| (no fused multiply-add); bfloat16: 2^-7 (cut off, not rounded)
    without VNNI    oneDNN saturates sums of int16 pairs: mean deviation 3.4 % where it was measured, 10 % allowed
"""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qarl.kernels import w8a8_int8, w8a8_int8_engine
from qarl.kernels.dispatch import choose
from qarl.kernels.w8a8_int8 import product, quantize, quantize_tokens

refused = w8a8_int8_engine.refusal("cpu", torch.float32)
needs_engine = pytest.mark.skipif(refused is not None, reason=str(refused))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def assert_as_exact_as_the_cpu(engine: Tensor, emulated: Tensor, bias: Tensor | None) -> None:
    if not torch.cpu._is_vnni_supported():
        assert (engine - emulated).abs().mean() <= 0.1 * emulated.abs().mean()
    elif torch.cpu._is_avx512_bf16_supported():
        assert torch.equal(engine, emulated)
    else:
        unit = emulated.float().abs() + (0 if bias is None else bias.float().abs())
        tolerance = 2**-22 if emulated.dtype == torch.float32 else 2**-7
        assert ((engine.float() - emulated.float()).abs() <= tolerance * unit).all()


def hostile_rows() -> Tensor:
    """Rows without NaN: normal, zero, ties, one outlier, inf of both signs, denormals below what 1/scale can hold."""
    x = torch.randn(7, 64)
    x[1] = 0
    x[2] = torch.arange(64) / 2 - 10
    x[2, 0] = 127
    x[3, 9] = 65504
    x[4, 5], x[4, 6] = float("inf"), float("-inf")
    x[5] = torch.tensor([1e-42, -1e-42, 0, 0]).repeat(16)
    x[6] *= 1e-38
    return x


def test_codes_span_127_at_the_absmax_of_each_row() -> None:
    weight = torch.randn(16, 64)
    codes = quantize(weight)["weight"]
    assert torch.equal(codes.abs().amax(-1), torch.full((16,), 127, dtype=torch.int8))
    assert quantize(-weight)["weight"].equal(-codes)


def test_tokens_against_numpy() -> None:
    x = torch.randn(50, 96)
    values = x.numpy()
    scale = np.abs(values).max(-1, keepdims=True) / np.float32(127)
    expected = np.clip(np.rint(values * (np.float32(1) / scale)), -128, 127)
    codes, ours = quantize_tokens(x)
    assert np.array_equal(codes.numpy(), expected) and np.array_equal(ours.numpy(), scale)


@pytest.mark.parametrize("k", [64, 1040, 1041, 16384])
@pytest.mark.parametrize("vnni", [True, False])
def test_the_integer_sum_is_exact_where_it_is_large(k: int, vnni: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against int64. Codes of one sign near 127 make sums beyond 2^24 from K = 1041 on: float32 would round on the way."""
    if vnni and not torch.cpu._is_vnni_supported():
        pytest.skip("this CPU has no VNNI: torch._int_mm would saturate, and is not used")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    weight, x = torch.randint(120, 128, (64, k), dtype=torch.int8), torch.randint(120, 128, (32, k))
    weight[1] *= -1
    x[:, 0] = 127  # so that the scale is 1
    codes = {"weight": weight, "weight_scale": torch.ones(64, 1)}
    assert torch.equal(product(x.float(), codes), (x @ weight.long().t()).float())


@needs_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_equal_the_engines_op(dtype: torch.dtype) -> None:
    """On AVX2 but for rows where 1/scale is not finite: what is 0 · inf has code -128 there, and scale 0 or a tiny one."""
    from vllm import _custom_ops as ops

    x = torch.cat([hostile_rows(), torch.randn(200, 64)]).to(dtype)
    codes, scale = quantize_tokens(x)
    theirs, their_scale, zero_point = ops.onednn_scaled_int8_quant(x)
    assert zero_point is None
    assert torch.equal(scale, their_scale)
    same = torch.cpu._is_avx512_supported() | ((1 / scale).isfinite() & scale.isfinite()).squeeze(-1)
    assert same.sum() >= 200
    assert torch.equal(codes[same], theirs[same])


@needs_engine
@given(st.integers(0, 2**32), st.floats(-30, 30))
@settings(max_examples=50, deadline=None)
def test_tokens_equal_the_engines_op_at_any_magnitude(seed: int, power: float) -> None:
    from vllm import _custom_ops as ops

    x = torch.randn(4, 33, generator=torch.Generator().manual_seed(seed)) * 10**power
    codes, scale = quantize_tokens(x)
    theirs, their_scale, _ = ops.onednn_scaled_int8_quant(x)
    assert torch.equal(scale, their_scale) and torch.equal(codes, theirs)


@needs_engine
@pytest.mark.parametrize("shape", [(1, 16, 32), (3, 7, 33), (5, 48, 64), (17, 100, 2048), (64, 256, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_engine_against_emulated(shape: tuple[int, int, int], dtype: torch.dtype, biased: bool) -> None:
    if dtype != torch.float32 and torch.cpu._is_amx_tile_supported():
        pytest.skip("refused there, see the test of that")
    m, n, k = shape
    codes, x = quantize(torch.randn(n, k)), torch.randn(m, k).to(dtype)
    bias = torch.randn(n).to(dtype) if biased else None
    engine, emulated = (m.product(x, m.prepare(codes, None, dtype), bias) for m in (w8a8_int8_engine, w8a8_int8))
    assert engine.dtype == dtype
    assert_as_exact_as_the_cpu(engine, emulated, bias)


@needs_engine
def test_engine_takes_no_rows_and_non_contiguous_rows() -> None:
    prepared: Any = w8a8_int8_engine.prepare(quantize(torch.randn(16, 32)), None, torch.float32)
    assert w8a8_int8_engine.product(torch.empty(0, 32), prepared).shape == (0, 16)
    x = torch.randn(32, 5).t()
    assert torch.equal(w8a8_int8_engine.product(x, prepared), w8a8_int8_engine.product(x.contiguous(), prepared))


@needs_engine
def test_engine_rows_that_are_not_finite_touch_no_other_row() -> None:
    """inf shows in its whole row, as in `emulated`; NaN may be lost in its row (it becomes code 0), but stays in it."""
    prepared: Any = w8a8_int8_engine.prepare(quantize(torch.randn(16, 64)), None, torch.float32)
    x = torch.randn(4, 64)
    clean = w8a8_int8_engine.product(x, prepared)
    x[1, 3], x[2, 3] = float("inf"), float("nan")
    y = w8a8_int8_engine.product(x, prepared)
    assert not y[1].isfinite().any()
    assert torch.equal(y[[0, 3]], clean[[0, 3]])


@needs_engine
def test_prepared_outlives_the_codes_it_was_made_of() -> None:
    """oneDNN's handle points into the scales: vLLM's own reload frees them and computes NaN."""
    codes, x = quantize(torch.randn(64, 64)), torch.randn(5, 64)
    prepared: Any = w8a8_int8_engine.prepare(codes, None, torch.float32)
    before = w8a8_int8_engine.product(x, prepared)
    del codes
    gc.collect()
    _ = [torch.full((64, size), float("nan")) for size in (1, 1, 1, 16, 64, 64)]
    assert torch.equal(w8a8_int8_engine.product(x, prepared), before)


@needs_engine
def test_engine_follows_vllms_layer_call_for_call() -> None:
    """Against vLLM's own layer kernel, with a weight of 3 fused parts as its loader leaves it."""
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUInt8ScaledMMLinearKernel
    from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import Int8ScaledMMLinearLayerConfig

    names = ["weight", "weight_scale", "input_scale", "input_zero_point", "azp_adj"]
    config = Int8ScaledMMLinearLayerConfig(is_static_input_scheme=False, is_channelwise=True, input_symmetric=True)
    layer, codes = torch.nn.Module(), quantize(torch.randn(96, 64))
    layer.logical_widths = [32, 32, 32]  # type: ignore[assignment]
    for name in names:
        value = codes.get(name)
        layer.register_parameter(
            name, None if value is None else torch.nn.Parameter(value.clone(), requires_grad=False)
        )
    theirs = CPUInt8ScaledMMLinearKernel(config, names)
    theirs.process_weights_for_onednn(layer)
    x, bias = torch.randn(7, 64), torch.randn(96)
    prepared: Any = w8a8_int8_engine.prepare(codes, None, torch.float32)
    assert torch.equal(w8a8_int8_engine.product(x, prepared), theirs._apply_weights_onednn(layer, x))
    assert torch.equal(w8a8_int8_engine.product(x, prepared, bias), theirs._apply_weights_onednn(layer, x, bias))


@needs_engine
def test_engine_refuses_sixteen_bits_on_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    codes = quantize(torch.randn(16, 64))
    with pytest.raises(ValueError, match="computes torch.bfloat16 with another kernel on a CPU with AMX"):
        w8a8_int8_engine.prepare(codes, None, torch.bfloat16)
    w8a8_int8_engine.prepare(codes, None, torch.float32)
    assert choose("w8a8_int8", "auto", "cpu", torch.bfloat16) == "emulated"
    assert choose("w8a8_int8", "auto", "cpu", torch.float32) == "engine"


def test_engine_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = w8a8_int8_engine.refusal
    assert w8a8_int8.refusal("cuda", torch.float32) is None
    monkeypatch.setattr(w8a8_int8_engine, "find_spec", lambda name: None)
    w8a8_int8_engine._engine_refusal.cache_clear()
    try:
        assert refusal("cpu", torch.float32) == "vLLM is not installed"
        with pytest.raises(ValueError, match="vLLM is not installed"):
            w8a8_int8_engine.prepare(quantize(torch.randn(4, 32)), None, torch.float32)
    finally:
        w8a8_int8_engine._engine_refusal.cache_clear()
