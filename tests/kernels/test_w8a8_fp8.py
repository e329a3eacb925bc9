"""e4m3: tokens as vLLM's CUDA op quantizes them, against a grid written out by hand."""

from __future__ import annotations

import numpy as np
import torch

from qarl.kernels.w8a8_fp8 import quantize, quantize_tokens

#: Every finite e4m3fn value: 2^(e-7)·(1 + m/8), denormals 2^-6·m/8, no inf, the last mantissa of the last exponent NaN.
POSITIVE = np.array(
    [m / 8 * 2**-6 for m in range(8)]
    + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8) if (e, m) != (15, 7)]
)


def nearest_even(values: np.ndarray) -> np.ndarray:
    """The nearest grid value, ties to the even mantissa (the even index), sign kept."""
    magnitude = np.minimum(np.abs(values), 448.0)
    above = np.clip(np.searchsorted(POSITIVE, magnitude), 1, len(POSITIVE) - 1)
    below = above - 1
    up, down = POSITIVE[above] - magnitude, magnitude - POSITIVE[below]
    index = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return np.sign(values) * POSITIVE[index]


def test_tokens_against_the_grid() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 96) * torch.logspace(-6, 6, 40)[:, None]
    x[0] = torch.arange(96) * 448 / 95
    codes, scale = quantize_tokens(x)
    expected_scale = np.maximum(np.abs(x.numpy()).max(-1, keepdims=True) / np.float32(448), np.float32(1 / (448 * 512)))
    assert np.array_equal(scale.numpy(), expected_scale)
    assert np.array_equal(codes.float().numpy(), nearest_even(x.numpy() / expected_scale))


def test_small_rows_keep_the_smallest_scale() -> None:
    codes, scale = quantize_tokens(torch.tensor([[0.0, 0.0], [1e-9, -1e-9], [1e-2, 0.0]]))
    assert scale[:, 0].tolist()[:2] == [float(np.float32(1 / (448 * 512)))] * 2
    assert torch.equal(codes[0].float(), torch.zeros(2))
    assert codes[2, 0].float() == 448


def test_weights_reach_448_and_never_nan() -> None:
    torch.manual_seed(0)
    codes = quantize(torch.randn(64, 128) * 1e4)["weight"].float()
    assert codes.isfinite().all()
    assert torch.equal(codes.abs().amax(-1), torch.full((64,), 448.0))
