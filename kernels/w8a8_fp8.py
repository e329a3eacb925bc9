"""w8a8_fp8: e4m3 weights per output channel, e4m3 inputs per token; products are summed in float32.

One backend, `emulated`: plain torch. A tensor core sums in another order, and in fewer bits on some generations, so
equality with an engine is to rounding, not to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qarl.kernels.epilogue import rescale

Codes = dict[str, Tensor]
BACKENDS = ("emulated",)

_MAX = 448.0
_MIN_SCALE = 1 / (_MAX * 512)


@torch.no_grad()
def quantize(weight: Tensor, group: int | None = None) -> Codes:
    """weight [*, N, K] -> `weight` float8_e4m3fn [*, N, K], `weight_scale` float32 [*, N, 1] = absmax/448.

    Cast to bfloat16 first. An all-zero row gets scale 1. A row with NaN or inf gets it as scale and dequantizes to NaN.
    """
    _no_group(group)
    w = weight.to(torch.bfloat16).float()
    scale = w.abs().amax(-1, keepdim=True) / _MAX
    scale = torch.where(scale == 0, 1.0, scale)
    return {"weight": _to_e4m3(w / scale), "weight_scale": scale}


def dequantize(codes: Codes, group: int | None, dtype: torch.dtype) -> Tensor:
    """Ŵ [*, N, K] = code · scale in float32, rounded to `dtype`."""
    _no_group(group)
    return (codes["weight"].float() * codes["weight_scale"]).to(dtype)


@torch.no_grad()
def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes float8_e4m3fn [M, K], scale float32 [M, 1] = max(absmax/448, 1/(448·512)).

    As vLLM's CUDA op `dynamic_per_token_scaled_fp8_quant`: x is divided by the scale (vLLM's torch fallback multiplies
    by the reciprocal, which differs in ties). A row with NaN or inf comes out NaN; no other row is touched.
    """
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / _MAX).clamp_min(_MIN_SCALE)
    return _to_e4m3(x / scale), scale


@dataclass(frozen=True)
class _Emulated:
    weight: Tensor
    """float32 [K, N]: codes."""
    scale: Tensor


def prepare(codes: Codes, group: int | None, backend: str, dtype: torch.dtype) -> _Emulated:
    """A matrix's codes as `product` wants them. Raises `ValueError` for another backend."""
    _no_group(group)
    if backend not in BACKENDS:
        raise ValueError(f"w8a8_fp8 has no backend {backend!r}; choices: {sorted(BACKENDS)}")
    return _Emulated(codes["weight"].float().t(), codes["weight_scale"])


def product(x: Tensor, prepared: _Emulated, bias: Tensor | None = None) -> Tensor:
    """y [M, N] in x's dtype, from x [M, K] (quantized here, per token) and bias [N]. M may be 0."""
    codes, scale = quantize_tokens(x)
    return rescale(codes.float() @ prepared.weight, scale, prepared.scale, bias, x.dtype)


def refusal(backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why `backend` does not run on that device here for inputs of `dtype`; `None` where it does."""
    return None


def _to_e4m3(values: Tensor) -> Tensor:
    # e4m3fn has no inf: without the clamp, what lies beyond 448 would become NaN.
    return values.clamp(-_MAX, _MAX).to(torch.float8_e4m3fn)


def _no_group(group: int | None) -> None:
    if group is not None:
        raise ValueError(f"w8a8_fp8 has one scale per output channel, no groups; got group {group}")
