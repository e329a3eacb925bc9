"""w8a8_int8: int8 weights per output channel, int8 inputs per token, both symmetric; the product is a sum of integers.

This is the definition and the backend `emulated`: plain torch, on any device the exact integer sum. Every division is by
a tensor: on CUDA torch multiplies by the reciprocal of a Python number, which is another float now and then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qarl.kernels.epilogue import rescale, rescale_experts
from qarl.kernels.routing import spans

Codes = dict[str, Tensor]

#: Largest K whose sum of 127·127 products stays below 2^24, the integers that float32 holds without a gap.
_FLOAT32_EXACT_K = 1040


@torch.no_grad()
def quantize(weight: Tensor, group: int | None = None) -> Codes:
    """weight [*, N, K] -> `weight` int8 [*, N, K] in -127…127, `weight_scale` float32 [*, N, 1] = absmax/127.

    Cast to bfloat16 first. An all-zero row gets scale 1. A row with NaN or inf gets it as scale and dequantizes to NaN;
    its codes are 0 where w / scale is NaN.
    """
    _no_group(group)
    w = weight.to(torch.bfloat16).float()
    absmax = w.abs().amax(-1, keepdim=True)
    scale = absmax / absmax.new_full((), 127)
    scale = torch.where(scale == 0, 1.0, scale)
    codes = (w / scale).round_().clamp_(-127, 127).nan_to_num_(0)
    return {"weight": codes.to(torch.int8), "weight_scale": scale}


def quantize_into(weight: Tensor, group: int | None, out: Codes) -> None:
    """`quantize`, written into these parts."""
    for part, values in quantize(weight, group).items():
        out[part].copy_(values)


def dequantize(codes: Codes, group: int | None, dtype: torch.dtype) -> Tensor:
    """Ŵ [*, N, K] = code · scale in float32, rounded to `dtype`."""
    _no_group(group)
    return (codes["weight"].float() * codes["weight_scale"]).to(dtype)


def columns(codes: Codes, group: int | None, at: Tensor) -> Tensor:
    """float32 [*, N, C]: the columns `at` int64 [C] of Ŵ, without the rest of it."""
    return codes["weight"][..., at].float() * codes["weight_scale"]


@torch.no_grad()
def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes int8 [M, K], scale float32 [M, 1] = absmax/127: vLLM's dynamic per-token op, bit for bit.

    code = round_half_even(x · inverse), saturated to -128…127, 0 where that is NaN. inverse = 127/absmax on CUDA,
    1/scale elsewhere: vLLM's op of each device (they differ in ties; inf for rows below 4e-37). A zero row gets scale 0;
    a row with inf gets scale inf, one with NaN gets NaN: both come out NaN. (vLLM's op may lose a NaN, depending on where
    in the row it stands.)
    """
    x = x.float()
    absmax = x.abs().amax(-1, keepdim=True)
    limit = absmax.new_full((), 127)
    scale = absmax / limit
    inverse = limit / absmax if x.is_cuda else 1 / scale
    return (x * inverse).round_().clamp_(-128, 127).nan_to_num_(0).to(torch.int8), scale


def prepare(codes: Codes, group: int | None, dtype: torch.dtype) -> Codes:
    """Codes as the products want them: as they are. A matrix, or E experts [E, N, K]."""
    _no_group(group)
    return codes


def product(x: Tensor, operand: Codes, bias: Tensor | None = None) -> Tensor:
    """y [M, N] in x's dtype, from x [M, K] (quantized here, per token) and bias [N]. M may be 0."""
    codes, scale = quantize_tokens(x)
    return rescale(_exact_sum(codes, operand["weight"]), scale, operand["weight_scale"], bias, x.dtype)


def grouped_product(x: Tensor, operand: Codes, offsets: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """y [M, N] in x's dtype, from x [M, K] with rows sorted by expert, `offsets` [E] where those of each end.

    Rows after the last offset are 0. `row_weights` [M] float32 multiply the result before it is rounded.
    """
    weight, w_scale = operand["weight"], operand["weight_scale"]
    y = x.new_zeros(len(x), weight.shape[1])
    codes, x_scale = quantize_tokens(x)
    for expert, rows in spans(offsets):
        acc = _exact_sum(codes[rows], weight[expert])
        weights = None if row_weights is None else row_weights[rows]
        y[rows] = rescale_experts(acc, x_scale[rows], w_scale[expert], weights, x.dtype)
    return y


def refusal(device_type: str, dtype: torch.dtype) -> str | None:
    """Why it does not run on that device for inputs of `dtype`: it always does."""
    return None


def _exact_sum(x: Tensor, w: Tensor) -> Tensor:
    """float32 [M, N]: x · wᵀ of int8 codes [M, K] and [N, K], summed exactly, rounded once."""
    if x.device.type == "cpu" and torch.cpu._is_vnni_supported() and len(x):
        return torch._int_mm(x, w.t()).float()  # without VNNI it saturates; on CUDA it takes some shapes only
    # On CUDA float32 products may be set to TF32, so the safe one is taken at any K.
    small = x.device.type == "cpu" and x.shape[-1] <= _FLOAT32_EXACT_K
    exact = torch.float32 if small else torch.float64
    return (x.to(exact) @ w.to(exact).t()).float()


def _no_group(group: int | None) -> None:
    if group is not None:
        raise ValueError(f"w8a8_int8 has one scale per output channel, no groups; got group {group}")
