"""w8a8_int8: int8 weights per output channel, int8 inputs per token, both symmetric; the product is a sum of integers.

`emulated` is the definition: the exact integer sum. `engine` calls vLLM's own CPU op (oneDNN), which is that exact sum
where the CPU has VNNI (results are then equal bit for bit, given AVX512_BF16; vLLM's other builds round the last step
otherwise), and saturates int16 pairs where it has not: 3.4 % off, which is why a learner has to call it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from qarl.kernels.epilogue import rescale

Codes = dict[str, Tensor]
BACKENDS = ("engine", "emulated")

#: Largest K whose sum of 127·127 products stays below 2^24, the integers that float32 holds without a gap.
_FLOAT32_EXACT_K = 1040


@torch.no_grad()
def quantize(weight: Tensor, group: int | None = None) -> Codes:
    """weight [*, N, K] -> `weight` int8 [*, N, K] in -127…127, `weight_scale` float32 [*, N, 1] = absmax/127.

    Cast to bfloat16 first. An all-zero row gets scale 1. A row with NaN or inf gets it as scale and dequantizes to NaN.
    """
    _no_group(group)
    w = weight.to(torch.bfloat16).float()
    scale = w.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return {"weight": (w / scale).round().clamp(-127, 127).to(torch.int8), "weight_scale": scale}


def dequantize(codes: Codes, group: int | None, dtype: torch.dtype) -> Tensor:
    """Ŵ [*, N, K] = code · scale in float32, rounded to `dtype`."""
    _no_group(group)
    return (codes["weight"].float() * codes["weight_scale"]).to(dtype)


@torch.no_grad()
def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes int8 [M, K], scale float32 [M, 1] = absmax/127: vLLM's dynamic per-token op, bit for bit.

    code = round_half_even(x · (1/scale)), saturated to -128…127 (1/scale is inf for rows below 4e-37), 0 where that is
    NaN. A zero row gets scale 0; a row with inf gets scale inf, so it comes out NaN. So does a row with NaN, whose
    scale is NaN here; vLLM's op may lose a NaN instead (it depends on where in the row it stands).
    """
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x * (1 / scale)).round_().clamp_(-128, 127).nan_to_num_(0).to(torch.int8), scale


@dataclass(frozen=True)
class _Emulated:
    weight: Tensor
    """[K, N], codes in the dtype in which their products are summed exactly."""
    scale: Tensor


@dataclass(frozen=True)
class _Engine:
    handler: Any
    """oneDNN's prepacked weight. It points into the two tensors below, so they must live as long as it does."""
    scale: Tensor
    azp_adj: Tensor


def prepare(codes: Codes, group: int | None, backend: str, dtype: torch.dtype) -> _Emulated | _Engine:
    """A matrix's codes as `product` wants them, for inputs of `dtype`. Raises `ValueError` for another backend."""
    _no_group(group)
    weight, scale = codes["weight"], codes["weight_scale"]
    if backend == "emulated":
        return _Emulated(weight.to(_exact_dtype(weight)).t(), scale)
    if backend == "engine":
        return _prepare_engine(weight, scale.contiguous(), dtype)
    raise ValueError(f"w8a8_int8 has no backend {backend!r}; choices: {sorted(BACKENDS)}")


def product(x: Tensor, prepared: _Emulated | _Engine, bias: Tensor | None = None) -> Tensor:
    """y [M, N] in x's dtype, from x [M, K] (quantized here, per token) and bias [N]. M may be 0."""
    if isinstance(prepared, _Engine):
        return _product_engine(x, prepared, bias)
    codes, scale = quantize_tokens(x)
    if prepared.weight.dtype == torch.int8 and len(codes):
        acc = torch._int_mm(codes, prepared.weight)
    else:
        acc = codes.to(prepared.weight.dtype) @ prepared.weight
    return rescale(acc.float(), scale, prepared.scale, bias, x.dtype)


def refusal(backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why `backend` does not run on that device here for inputs of `dtype`; `None` where it does."""
    if backend != "engine":
        return None
    if reason := _engine_refusal(device_type):
        return reason
    if torch.cpu._is_amx_tile_supported() and dtype != torch.float32:
        # In float32 vLLM is left with oneDNN: its AMX kernel takes 16-bit inputs only.
        return f"vLLM computes {dtype} with another kernel on a CPU with AMX, which is not wired up"
    return None


def _exact_dtype(weight: Tensor) -> torch.dtype:
    """The quickest dtype in which a product with int8 codes is the exact sum on this device."""
    if weight.device.type == "cpu" and torch.cpu._is_vnni_supported():
        return torch.int8  # torch._int_mm; without VNNI it saturates
    return torch.float32 if weight.shape[-1] <= _FLOAT32_EXACT_K else torch.float64


@cache
def _engine_refusal(device_type: str) -> str | None:
    if device_type != "cpu":
        return f"vLLM's op is wired up for cpu only, not for {device_type}"
    if find_spec("vllm") is None:
        return "vLLM is not installed"
    # 3 s of CPU in a process that has transformers loaded, 7 s in a bare one. Loading the shared library alone takes
    # 4 ms, but which of three to load is vLLM's decision, and a second one in a process cannot be loaded.
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    if not (ops._supports_onednn and current_platform.is_cpu()):
        return "this vLLM is not the CPU build with oneDNN"
    is_zen = getattr(current_platform, "is_zen_cpu", lambda: False)
    return "vLLM uses zentorch's kernel on this machine, which is not wired up" if is_zen() else None


def _prepare_engine(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> _Engine:
    """The calls of vLLM's `CPUInt8ScaledMMLinearKernel.process_weights_for_onednn`, symmetric and dynamic per token."""
    if reason := refusal("engine", weight.device.type, dtype):
        raise ValueError(f"w8a8_int8 cannot use backend 'engine': {reason}")
    from vllm import _custom_ops as ops

    w = weight.t()
    azp_adj = w.sum(dim=0, keepdim=True, dtype=torch.float32) * scale.squeeze(-1)
    return _Engine(ops.create_onednn_scaled_mm(w, scale, dtype, True, False, 32), scale, azp_adj)


def _product_engine(x: Tensor, prepared: _Engine, bias: Tensor | None) -> Tensor:
    """The calls of vLLM's `CPUInt8ScaledMMLinearKernel._apply_weights_onednn`."""
    from vllm import _custom_ops as ops

    codes, scale, zero_point = ops.onednn_scaled_int8_quant(x.contiguous(), None, None, True)
    y = torch.empty(len(x), prepared.handler.n, dtype=x.dtype)
    ops.onednn_scaled_mm(prepared.handler, codes, y, scale, zero_point, prepared.azp_adj, bias)
    return y


def _no_group(group: int | None) -> None:
    if group is not None:
        raise ValueError(f"w8a8_int8 has one scale per output channel, no groups; got group {group}")
