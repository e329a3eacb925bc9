"""int4 in Triton: bit for bit the definition on the CPU, on every kind of number, and torch's products of its weights.

Without a GPU the kernels run in Triton's interpreter. Inputs are new in every run; a failure prints their seed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton.runtime.interpreter as interpreter
from torch import Tensor
from triton import language as tl

from qarl.kernels import w4a16, w4a16_fused
from qarl.kernels.w4a16_few_fused import product_of_few
from qarl.kernels.w4a16_fused import dequantize, grouped_product, prepare, product, quantize

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def seed() -> None:
    seed = time.time_ns() % 2**32
    print("seed", seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _rounding_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts a float32 to bfloat16 and loses denormals; a GPU (cvt.rn) and torch round half to even. And it
    computes with the bits of a bfloat16 as if they were an integer."""
    builder = interpreter.InterpreterBuilder
    cast, dot, binary = builder.cast_impl, builder.create_dot, builder.binary_op

    def rounding_cast(self: Any, src: Any, dst_type: Any) -> Any:
        pair = (src.dtype.scalar, dst_type.scalar)
        if pair == (tl.float32, tl.bfloat16):
            bits = torch.from_numpy(np.array(src.data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        elif pair == (tl.bfloat16, tl.float32):
            bits = (src.data.astype(np.uint32) << 16).view(np.float32)
        else:
            return cast(self, src, dst_type)
        return interpreter.TensorHandle(bits, dst_type.scalar)

    def widening_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return dot(self, *(rounding_cast(self, one, tl.float32) for one in (a, b)), *others)

    def rounding_binary(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if lhs.dtype.scalar != tl.bfloat16:
            return binary(self, lhs, rhs, op)
        wide = binary(self, *(rounding_cast(self, one, tl.float32) for one in (lhs, rhs)), op)
        return rounding_cast(self, wide, tl.bfloat16)

    monkeypatch.setattr(builder, "cast_impl", rounding_cast)
    monkeypatch.setattr(builder, "create_dot", widening_dot)
    monkeypatch.setattr(builder, "binary_op", rounding_binary)


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Bit for bit, on any devices; one NaN is as good as another."""
    ours = ours.cpu()
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    if ours.is_floating_point():
        assert torch.equal(ours.isnan(), theirs.isnan())
        ours, theirs = ours.nan_to_num(0, INF, -INF), theirs.nan_to_num(0, INF, -INF)
        assert torch.equal(ours.signbit(), theirs.signbit())  # equal holds -0 for 0
    assert torch.equal(ours, theirs)


def assert_defined(weight: Tensor, group: int, device: str) -> None:
    """quantize and dequantize of a weight that lies on the CPU."""
    expected, codes = w4a16.quantize(weight, group), quantize(weight.to(device), group)
    assert expected.keys() == codes.keys()
    for part, tensor in codes.items():
        assert_same(tensor, expected[part])
    for dtype in (torch.bfloat16, torch.float32):
        assert_same(dequantize(codes, group, dtype), w4a16.dequantize(expected, group, dtype))


@pytest.mark.parametrize(
    ("shape", "group"),
    [
        ((1, 8), 8),
        ((1, 128), 128),
        ((33, 256), 128),
        ((65, 96), 32),
        ((7, 72), 24),
        ((3, 40), 40),
        ((5, 4104), 4104),
        ((3, 5, 96), 32),
        ((2, 3, 2, 48), 16),
        ((0, 128), 128),
        ((0, 16, 128), 32),
        ((4, 0, 128), 32),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_codes_are_those_of_the_definition(shape: tuple[int, ...], group: int, dtype: torch.dtype, device: str) -> None:
    assert_defined(torch.randn(shape).to(dtype), group, device)


def hostile() -> Tensor:
    """[16, 128]: groups of 32 that are zero, denormal, one-sided, constant, huge, or hold inf or NaN."""
    w = torch.randn(16, 128)
    w[0] = 0
    w[1, :32] = 0
    w[2] *= 1e-38
    w[3] *= 1e-40
    w[4] = torch.randint(-11, 12, (128,)) * 2.0**-133
    w[5, 3], w[5, 64] = 65504, -65504
    w[6] *= torch.finfo(torch.bfloat16).max / w[6].abs().max()
    w[7, 5] = torch.finfo(torch.bfloat16).max
    w[8] = -0.37
    w[9] = w[9].abs()
    w[10, 40] = INF
    w[11, 41] = -INF
    w[12, 42] = NAN
    w[13, 96:] = NAN
    w[14, 3], w[14, 4] = NAN, INF
    w[15, ::2] = -0.0
    return w


@pytest.mark.parametrize("group", [8, 32, 64, 128])
def test_hostile_weights(group: int, device: str) -> None:
    assert_defined(hostile(), group, device)


def test_nonfinite_groups_leave_their_neighbours_alone(device: str) -> None:
    weight = torch.randn(8, 128)
    clean = dequantize(quantize(weight.to(device), 32), 32, torch.float32)
    for value in (NAN, INF, -INF):
        weight[3, 40] = value
        grid = dequantize(quantize(weight.to(device), 32), 32, torch.float32)
        assert grid[3, 32:64].isnan().all()
        grid[3, 32:64] = clean[3, 32:64]
        assert torch.equal(grid, clean)


def test_every_absmax(device: str) -> None:
    """All 2^15 magnitudes of bfloat16, denormals, inf and NaN among them: no scale differs from a true division's."""
    weight = torch.rand(2**15, 8).bfloat16()
    weight[:, 0] = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    weight[:, 1:] = weight[:, :1].float().nan_to_num(1, 1) * (2 * weight[:, 1:].float() - 1)
    assert_defined(weight, 8, device)


@pytest.mark.parametrize("exponent", [-133, -130, -126, 0, 115])
def test_every_quotient(exponent: int, device: str) -> None:
    """w / scale for all pairs of an 8-bit w, down to a 32nd of absmax, and absmax: no code differs from a true division's."""
    absmax = torch.arange(128, 256)[:, None]
    w = (torch.arange(128, 256) * 2 ** torch.arange(6)[:, None]).flatten().repeat(128, 1)
    w = torch.where(w <= 32 * absmax, w, 32 * absmax) * (1 - 2 * torch.randint(0, 2, w.shape))
    weight = torch.cat([32 * absmax, w, torch.zeros(128, 7, dtype=w.dtype)], 1).double() * 2.0 ** (exponent - 5)
    assert_defined(weight.bfloat16(), weight.shape[1], device)


def test_any_strides(device: str) -> None:
    buffer = torch.randn(2, 96, 136).bfloat16()
    for view in (
        buffer.transpose(1, 2),
        buffer[:, ::2, 8:],
        buffer.flatten()[1 : 1 + 24 * 64].view(24, 64),
        buffer[0, :, :32].expand(3, 96, 32),
    ):
        there = buffer.to(device).as_strided(view.shape, view.stride(), view.storage_offset())
        codes = quantize(there, 32)
        for part, tensor in w4a16.quantize(view, 32).items():
            assert_same(codes[part], tensor)


def test_any_codes_and_scales(device: str) -> None:
    """Also those that no weight has: every nibble with every kind of scale, and strided parts."""
    packed = torch.randint(-(2**31), 2**31, (70, 32), dtype=torch.int32)[:, ::2]
    scale = torch.randint(-(2**15), 2**15, (70, 4), dtype=torch.int16).view(torch.bfloat16)
    scale[0], scale[1], scale[2] = INF, NAN, torch.finfo(torch.bfloat16).max
    codes = {"weight_packed": packed, "weight_scale": scale}
    there = {part: tensor.to(device) for part, tensor in codes.items()}
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        assert_same(dequantize(there, 32, dtype), w4a16.dequantize(codes, 32, dtype))


@pytest.mark.parametrize("group", [48, 12, None, 0])
def test_a_group_that_does_not_fit_is_refused(group: int | None, device: str) -> None:
    codes = quantize(torch.randn(4, 128, device=device), 32)
    with pytest.raises(ValueError, match=f"got group {group}, K 128"):
        quantize(torch.randn(4, 128, device=device), group)
    with pytest.raises(ValueError, match=f"got group {group}, K 128"):
        dequantize(codes, group, torch.bfloat16)


@pytest.mark.parametrize("group", [8, 24, 128])
def test_kernels_write_nothing_beyond_their_outputs(group: int, device: str) -> None:
    n_groups = 45  # no multiple of a program's groups
    weight = torch.randn(n_groups, group, device=device).bfloat16()
    packed = torch.full((2 * n_groups, group // 8), 77, dtype=torch.int32, device=device)
    scale, back = (torch.full((2 * n_groups, n), 7.0, device=device).bfloat16() for n in (1, group))
    grid, blocks = w4a16_fused._tiling(n_groups, group, **w4a16_fused._QUANTIZE)
    w4a16_fused._quantize_kernel[grid](weight, packed, scale, n_groups, group, **blocks)
    grid, blocks = w4a16_fused._tiling(n_groups, group, **w4a16_fused._DEQUANTIZE)
    w4a16_fused._dequantize_kernel[grid](packed, scale, back, n_groups, group, **blocks)
    assert (packed[n_groups:] == 77).all() and (scale[n_groups:] == 7).all() and (back[n_groups:] == 7).all()
    assert_same(back[:n_groups], w4a16.dequantize(w4a16.quantize(weight.cpu(), group), group, torch.bfloat16))


def operand_of(weight: Tensor, group: int = 32) -> tuple[Any, Tensor]:
    """The operand, and the dequantized weight in float64."""
    codes = quantize(weight, group)
    return prepare(codes, group, torch.bfloat16), dequantize(codes, group, torch.float64)


def assert_product(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Half a step of bfloat16 (2^-9), and float32 sums in any order: K · 2^-24 of Σ|x·w|, twice that on tensor cores."""
    exact = torch.nn.functional.linear(x.double(), weight, None if bias is None else bias.double())
    magnitude = torch.nn.functional.linear(
        x.double().abs(), weight.abs(), None if bias is None else bias.double().abs()
    )
    assert y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= 2**-8 * exact.abs() + 2 * (x.shape[1] + 1) * 2**-24 * magnitude).all()


@pytest.mark.parametrize("m", [0, 1, 17])
@pytest.mark.parametrize("biased", [False, True])
def test_product_against_float64(m: int, biased: bool, device: str) -> None:
    operand, weight = operand_of(torch.randn(24, 96, device=device))
    x = torch.randn(m, 96, device=device).bfloat16()
    bias = torch.randn(24, device=device).bfloat16() if biased else None
    y = product(x, operand, bias)
    assert y.shape == (m, 24)
    assert_product(y, x, weight, bias)


def test_an_operand_is_views_of_the_codes(device: str) -> None:
    codes = quantize(torch.randn(24, 96, device=device), 32)
    operand = prepare(codes, 32, torch.bfloat16)
    assert {t.data_ptr() for t in operand.codes.values()} == {t.data_ptr() for t in codes.values()}


@pytest.mark.parametrize("ends", [[4, 9, 30], [0, 0, 30], [30, 30, 30], [7, 7, 19], [0, 0, 0]])
@pytest.mark.parametrize("n", [300, 13])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("m", "k", "group"),
    [(30, 256, 32), (30, 256, 256), (30, 96, 32), (60, 128, 32)],
    ids=["few", "few-long", "few-odd", "many"],
)
def test_grouped_product_is_a_loop_over_experts(
    ends: list[int], n: int, weighted: bool, m: int, k: int, group: int, device: str
) -> None:
    """Empty experts, all rows on one, rows of no expert, and more columns or inputs than a block or no multiple of one."""
    operand, weight = operand_of(torch.randn(3, n, k, device=device), group)
    x = torch.randn(m, k, device=device).bfloat16()
    ends = [end * m // 30 for end in ends]
    x[ends[-1] :] = NAN
    row_weights = torch.rand(m, device=device) if weighted else None
    y = grouped_product(x, operand, torch.tensor(ends, device=device), row_weights)
    assert y.shape == (m, n)
    assert not y[ends[-1] :].any()
    if row_weights is not None:
        plain = grouped_product(x, operand, torch.tensor(ends, dtype=torch.int32, device=device))
        assert_same(y, (plain * row_weights.bfloat16()[:, None]).cpu())
        y = plain
    for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        assert_product(y[start:end], x[start:end], weight[e])


@pytest.mark.parametrize("group", [8, 32, 128])
def test_few_rows_multiply_by_the_defined_weight(group: int, device: str) -> None:
    """One-hot rows read columns of it, bit for bit: all sixteen codes, scales from the smallest to the largest."""
    codes = {
        "weight_packed": torch.randint(-(2**31), 2**31, (3, 40, 16), device=device, dtype=torch.int32),
        "weight_scale": torch.exp2(torch.linspace(-133, 124, 3 * 40 * (128 // group), device=device)).bfloat16(),
    }
    codes["weight_scale"] = codes["weight_scale"].view(3, 40, -1)
    x = torch.eye(128, device=device)[torch.randperm(128)[:30]].bfloat16()
    y = product_of_few(x, codes, group, torch.tensor([10, 20, 30], dtype=torch.int32, device=device))
    columns = x.argmax(1).view(3, 10)
    weight = w4a16.dequantize({name: part.cpu() for name, part in codes.items()}, group, torch.bfloat16)
    alone = product_of_few(x[29:], codes, group, torch.tensor([0, 0, 1], dtype=torch.int32, device=device))
    assert torch.equal(alone[0], y[29])
    for expert in range(3):
        assert torch.equal(y[10 * expert : 10 * expert + 10].cpu(), weight[expert][:, columns[expert].cpu()].T)


def test_the_compiler_takes_few_rows_for_every_group() -> None:
    """For a Hopper, on any machine: the interpreter takes what a compiler does not, a variable for a constant."""
    surroundings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, Path(__file__).with_name("compile_w4a16.py")], check=True, env=surroundings)


def test_grouped_product_of_nothing(device: str) -> None:
    operand, _ = operand_of(torch.randn(3, 24, 96, device=device))
    empty = torch.zeros(0, 96, device=device, dtype=torch.bfloat16)
    assert grouped_product(empty, operand, torch.zeros(3, dtype=torch.int32, device=device)).shape == (0, 24)
    none, _ = operand_of(torch.randn(0, 24, 96, device=device))
    y = grouped_product(torch.ones(5, 96, device=device).bfloat16(), none, torch.zeros(0, device=device).int())
    assert y.shape == (5, 24) and not y.any()


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("m", [20, 60], ids=["few", "many"])
def test_nonfinite_inputs_stay_in_their_row(value: float, m: int, device: str) -> None:
    operand, _ = operand_of(torch.randn(3, 24, 128, device=device))
    x = torch.randn(m, 128, device=device).bfloat16()
    offsets = torch.tensor([6, 6, m], device=device)
    clean = grouped_product(x, operand, offsets)
    x[8, 5] = value
    y = grouped_product(x, operand, offsets, None)
    assert not y[8].isfinite().any()
    y[8] = clean[8]
    assert torch.equal(y, clean)


def test_refusals() -> None:
    assert "CUDA" in str(w4a16_fused.refusal("cpu", torch.bfloat16))
    if torch.cuda.is_available():
        assert w4a16_fused.refusal("cuda", torch.bfloat16) is None
        assert "bfloat16" in str(w4a16_fused.refusal("cuda", torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(24576, 4096), (4096, 12288), (128, 1536, 2048), (128, 2048, 768)])
@pytest.mark.parametrize("group", [32, 128])
def test_true_shapes(shape: tuple[int, ...], group: int) -> None:
    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    codes = quantize(weight, group)
    back = dequantize(codes, group, torch.bfloat16)
    for rows in (slice(0, 2), slice(-2, None)):
        expected = w4a16.quantize(weight[rows].cpu(), group)
        for part, tensor in codes.items():
            assert_same(tensor[rows], expected[part])
        assert_same(back[rows], w4a16.dequantize(expected, group, torch.bfloat16))
    assert torch.equal(back, w4a16.dequantize(codes, group, torch.bfloat16))


@pytest.mark.gpu
def test_more_than_two_to_the_31_weights() -> None:
    weight = torch.randn(2**20 + 3, 2**11, device="cuda", dtype=torch.bfloat16)
    codes = quantize(weight, 128)
    assert_same(dequantize(codes, 128, torch.bfloat16)[-9:], _grid(weight[-9:].cpu()))
    assert_same(codes["weight_packed"][-9:], w4a16.quantize(weight[-9:].cpu(), 128)["weight_packed"])


def _grid(weight: Tensor) -> Tensor:
    return w4a16.dequantize(w4a16.quantize(weight, 128), 128, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize(("most", "crowd"), [(8, 300), (100, 3000)], ids=["few", "many"])
def test_true_expert_layer(group: int, most: int, crowd: int) -> None:
    """Qwen3-30B-A3B's gate and up: 128 experts, one of them empty, one crowded; an eighth of the rows has no expert."""
    operand, _ = operand_of(torch.randn(128, 1536, 2048, device="cuda", dtype=torch.bfloat16), group)
    counts = torch.randint(1, most, (128,), device="cuda")
    counts[17], counts[40] = 0, crowd
    offsets = counts.cumsum(0)
    x = torch.randn(int(offsets[-1]) * 8 // 7, 2048, device="cuda", dtype=torch.bfloat16)
    y = grouped_product(x, operand, offsets)
    ends = offsets.tolist()
    assert not y[ends[-1] :].any()
    for e in (0, 17, 18, 40, 127):
        start = ends[e - 1] if e else 0
        assert_product(y[start : ends[e]], x[start : ends[e]], operand.weight()[e].double())
