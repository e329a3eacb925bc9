"""w8a8_fp8: e4m3 weights per output channel, e4m3 inputs per token; products are summed in float32.

This is the definition and the backend `emulated`: plain torch. A tensor core sums in another order, and in fewer bits on
some generations, so equality with an engine is to rounding, not to the bit. Every division is by a tensor: on CUDA torch
multiplies by the reciprocal of a Python number, which is another float now and then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qarl.kernels.epilogue import rescale, rescale_experts
from qarl.kernels.routing import spans

Codes = dict[str, Tensor]

_MAX = 448.0
_MIN_SCALE = 1 / (_MAX * 512)


@torch.no_grad()
def quantize(weight: Tensor, group: int | None = None) -> Codes:
    """weight [*, N, K] -> `weight` float8_e4m3fn [*, N, K], `weight_scale` float32 [*, N, 1] = absmax/448.

    Cast to bfloat16 first. An all-zero row gets scale 1. A row with NaN or inf gets it as scale and dequantizes to NaN.
    """
    _no_group(group)
    w = weight.to(torch.bfloat16).float()
    absmax = w.abs().amax(-1, keepdim=True)
    scale = absmax / absmax.new_full((), _MAX)
    scale = torch.where(scale == 0, 1.0, scale)
    return {"weight": _to_e4m3(w / scale), "weight_scale": scale}


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
    """x [M, K] -> codes float8_e4m3fn [M, K], scale float32 [M, 1] = max(absmax/448, 1/(448·512)).

    As vLLM's CUDA op `dynamic_per_token_scaled_fp8_quant`: x is divided by the scale (vLLM's torch fallback multiplies
    by the reciprocal, which differs in ties). A row with NaN or inf comes out NaN; no other row is touched.
    """
    x = x.float()
    absmax = x.abs().amax(-1, keepdim=True)
    scale = (absmax / absmax.new_full((), _MAX)).clamp_min(_MIN_SCALE)
    return _to_e4m3(x / scale), scale


def prepare(codes: Codes, group: int | None, dtype: torch.dtype) -> Codes:
    """Codes as the products want them: as they are. A matrix, or E experts [E, N, K]."""
    _no_group(group)
    return codes


def product(x: Tensor, operand: Codes, bias: Tensor | None = None) -> Tensor:
    """y [M, N] in x's dtype, from x [M, K] (quantized here, per token) and bias [N]. M may be 0."""
    codes, scale = quantize_tokens(x)
    acc = codes.float() @ operand["weight"].float().t()
    return rescale(acc, scale, operand["weight_scale"], bias, x.dtype)


def grouped_product(x: Tensor, operand: Codes, offsets: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """y [M, N] in x's dtype, from x [M, K] with rows sorted by expert, `offsets` [E] where those of each end.

    Rows after the last offset are 0. `row_weights` [M] float32 multiply the result before it is rounded.
    """
    weight, w_scale = operand["weight"], operand["weight_scale"]
    y = x.new_zeros(len(x), weight.shape[1])
    codes, x_scale = quantize_tokens(x)
    for expert, rows in spans(offsets):
        acc = codes[rows].float() @ weight[expert].float().t()
        weights = None if row_weights is None else row_weights[rows]
        y[rows] = rescale_experts(acc, x_scale[rows], w_scale[expert], weights, x.dtype)
    return y


def refusal(device_type: str, dtype: torch.dtype) -> str | None:
    """Why it does not run on that device for inputs of `dtype`: it always does."""
    return None


def _to_e4m3(values: Tensor) -> Tensor:
    # e4m3fn has no inf: without the clamp, what lies beyond 448 would become NaN.
    return values.clamp(-_MAX, _MAX).to(torch.float8_e4m3fn)


def _no_group(group: int | None) -> None:
    if group is not None:
        raise ValueError(f"w8a8_fp8 has one scale per output channel, no groups; got group {group}")
