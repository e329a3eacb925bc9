"""w8a8_int8 by vLLM's own op, which on CPU is oneDNN's.

It is the definition's exact integer sum where the CPU has VNNI (results are then equal bit for bit, given AVX512_BF16;
vLLM's other builds round the last step otherwise), and saturates int16 pairs where it has not: 3.4 % off, which is why a
learner has to call it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from qarl.kernels.routing import spans
from qarl.kernels.w8a8_int8 import Codes, dequantize, quantize, quantize_tokens

__all__ = ["dequantize", "grouped_product", "prepare", "product", "quantize", "quantize_tokens", "refusal"]


@dataclass(frozen=True)
class Operand:
    handler: Any
    """oneDNN's prepacked weight. It points into the two tensors below, so they must live as long as it does."""
    scale: Tensor
    azp_adj: Tensor


def prepare(codes: Codes, group: int | None, dtype: torch.dtype) -> Operand | list[Operand]:
    """Codes as `product` wants them, for inputs of `dtype`: a matrix, or E experts as a list. Raises `ValueError` where
    it does not run."""
    weight, scale = codes["weight"], codes["weight_scale"]
    if reason := refusal(weight.device.type, dtype):
        raise ValueError(f"w8a8_int8 cannot use backend 'engine': {reason}")
    if weight.dim() == 2:
        return _prepare_engine(weight, scale.contiguous(), dtype)
    return [_prepare_engine(w, s.contiguous(), dtype) for w, s in zip(weight, scale, strict=True)]


def product(x: Tensor, operand: Operand, bias: Tensor | None = None) -> Tensor:
    """y [M, N] in x's dtype, from x [M, K] (quantized here, per token) and bias [N]. M may be 0."""
    return _product_engine(x, operand, bias)


def grouped_product(x: Tensor, operand: list[Operand], offsets: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """y [M, N]: rows sorted by expert, `offsets` [E] where those of each end; rows after the last are 0.

    `row_weights` [M] multiply the rounded product here: the op rounds, and vLLM has no int8 experts on CPU to equal.
    """
    y = x.new_zeros(len(x), operand[0].handler.n)
    for expert, rows in spans(offsets):
        y[rows] = product(x[rows], operand[expert])
    return y if row_weights is None else (y * row_weights[:, None]).to(x.dtype)


def refusal(device_type: str, dtype: torch.dtype) -> str | None:
    """Why it does not run on that device here for inputs of `dtype`; `None` where it does. Asking imports vLLM."""
    if reason := _engine_refusal(device_type):
        return reason
    if torch.cpu._is_amx_tile_supported() and dtype != torch.float32:
        # In float32 vLLM is left with oneDNN: its AMX kernel takes 16-bit inputs only.
        return f"vLLM computes {dtype} with another kernel on a CPU with AMX, which is not wired up"
    return None


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


def _prepare_engine(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Operand:
    """The calls of vLLM's `CPUInt8ScaledMMLinearKernel.process_weights_for_onednn`, symmetric and dynamic per token."""
    from vllm import _custom_ops as ops

    w = weight.t()
    azp_adj = w.sum(dim=0, keepdim=True, dtype=torch.float32) * scale.squeeze(-1)
    return Operand(ops.create_onednn_scaled_mm(w, scale, dtype, True, False, 32), scale, azp_adj)


def _product_engine(x: Tensor, operand: Operand, bias: Tensor | None) -> Tensor:
    """The calls of vLLM's `CPUInt8ScaledMMLinearKernel._apply_weights_onednn`."""
    from vllm import _custom_ops as ops

    codes, scale, zero_point = ops.onednn_scaled_int8_quant(x.contiguous(), None, None, True)
    y = torch.empty(len(x), operand.handler.n, dtype=x.dtype)
    ops.onednn_scaled_mm(operand.handler, codes, y, scale, zero_point, operand.azp_adj, bias)
    return y
