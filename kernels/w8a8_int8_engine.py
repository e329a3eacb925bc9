"""w8a8_int8 by vLLM's own ops: on CUDA as vLLM 0.26 calls them, on CPU oneDNN's.

CUDA: the definition's bits. A matrix is `scaled_int8_quant` and CUTLASS (`CutlassInt8ScaledMMLinearKernel`). Rows are
quantized by `fused`'s kernel, which gives that op's bits sooner. Experts are a Triton kernel in vLLM, on rows that the
same op quantizes; here they are `fused`'s: the same integers, scaled in the same order. (vLLM adds them up in float32, so
a sum beyond 2^24 may differ in its last bit.)

CPU: the definition's exact sum where there is VNNI (results are then equal bit for bit, given AVX512_BF16; vLLM's other
builds round the last step otherwise). Without VNNI oneDNN saturates int16 pairs: 3.4 % off, which is why a learner has to
call it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qarl.kernels.dispatch import Codes, quantizer
from qarl.kernels.routing import spans

if TYPE_CHECKING:
    from qarl.kernels.w8a8_int8_fused import Operand as CudaOperand


def quantize(weight: Tensor, group: int | None = None) -> Codes:
    """weight [*, N, K] -> the definition's codes; on CUDA by the kernel of `fused`, whose bits are the same."""
    return _rows(weight).quantize(weight, group)


def dequantize(codes: Codes, group: int | None, dtype: torch.dtype) -> Tensor:
    """Ŵ [*, N, K], likewise."""
    return _rows(codes["weight"]).dequantize(codes, group, dtype)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] -> codes int8 [M, K], scale float32 [M, 1], likewise: those of vLLM's op on x's device."""
    return _rows(x).quantize_tokens(x)


def _rows(x: Tensor) -> Any:
    """The module to quantize x with."""
    return quantizer("w8a8_int8", x.device.type)


@dataclass(frozen=True)
class CpuOperand:
    handler: Any
    """oneDNN's prepacked weight. It points into the two tensors below, so they must live as long as it does."""
    scale: Tensor
    azp_adj: Tensor


def prepare(codes: Codes, group: int | None, dtype: torch.dtype) -> CudaOperand | CpuOperand | list[CpuOperand]:
    """Codes as the products want them, for inputs of `dtype`: a matrix, or E experts. Raises `ValueError` where it does
    not run."""
    weight, scale = codes["weight"], codes["weight_scale"]
    if reason := refusal(weight.device.type, dtype):
        raise ValueError(f"w8a8_int8 cannot use backend 'engine': {reason}")
    if weight.is_cuda:
        from qarl.kernels import w8a8_int8_fused

        return w8a8_int8_fused.prepare(codes, group, dtype)
    if weight.dim() == 2:
        return _prepare_cpu_engine(weight, scale.contiguous(), dtype)
    return [_prepare_cpu_engine(w, s.contiguous(), dtype) for w, s in zip(weight, scale, strict=True)]


@torch.no_grad()
def product(x: Tensor, operand: Any, bias: Tensor | None = None) -> Tensor:
    """y [M, N] in x's dtype, from x [M, K] (quantized here, per token), `prepare`'s operand and bias [N]. M may be 0."""
    return _product_cuda_engine(x, operand, bias) if x.is_cuda else _product_cpu_engine(x, operand, bias)


@torch.no_grad()
def grouped_product(x: Tensor, operand: Any, offsets: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """y [M, N]: rows sorted by expert, `offsets` [E] where those of each end; rows after the last are 0.

    `row_weights` [M] float32 multiply the result: on CUDA before it is rounded, as in vLLM's kernel. On CPU the op has
    rounded by then, and vLLM has no int8 experts there to equal.
    """
    if x.is_cuda:
        from qarl.kernels import w8a8_int8_fused

        return w8a8_int8_fused.grouped_product(x, operand, offsets, row_weights)
    y = x.new_zeros(len(x), operand[0].handler.n)
    for expert, rows in spans(offsets):
        y[rows] = product(x[rows], operand[expert])
        if row_weights is not None:
            y[rows] *= row_weights[rows, None]
    return y


def refusal(device_type: str, dtype: torch.dtype) -> str | None:
    """Why it does not run on that device here for inputs of `dtype`; `None` where it does. Asking imports vLLM."""
    if reason := _engine_refusal(device_type):
        return reason
    if device_type == "cuda":
        return None if dtype == torch.bfloat16 else f"on cuda it takes torch.bfloat16, not {dtype}"
    if torch.cpu._is_amx_tile_supported() and dtype != torch.float32:
        # In float32 vLLM is left with oneDNN: its AMX kernel takes 16-bit inputs only.
        return f"vLLM computes {dtype} with another kernel on a CPU with AMX, which is not wired up"
    return None


@cache
def _engine_refusal(device_type: str) -> str | None:
    if device_type not in ("cpu", "cuda"):
        return f"vLLM's op is wired up for cpu and cuda only, not for {device_type}"
    if find_spec("vllm") is None:
        return "vLLM is not installed"
    # 3 s of CPU in a process that has transformers loaded, 7 s in a bare one. Loading the shared library alone takes
    # 4 ms, but which of three to load is vLLM's decision, and a second one in a process cannot be loaded.
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    if device_type == "cuda":
        if not current_platform.is_cuda():
            return "this vLLM is not the CUDA build, or there is no GPU"
        hopper = current_platform.is_device_capability(90)
        return None if hopper else "the experts' product is wired up for Hopper (compute capability 9.0) only"
    if not (ops._supports_onednn and current_platform.is_cpu()):
        return "this vLLM is not the CPU build with oneDNN"
    is_zen = getattr(current_platform, "is_zen_cpu", lambda: False)
    return "vLLM uses zentorch's kernel on this machine, which is not wired up" if is_zen() else None


def _product_cuda_engine(x: Tensor, operand: CudaOperand, bias: Tensor | None) -> Tensor:
    """vLLM's `CutlassInt8ScaledMMLinearKernel.apply_weights`, symmetric and dynamic per token."""
    from vllm import _custom_ops as ops

    if not len(x):  # not a size for its kernels
        return x.new_empty(0, len(operand.codes))
    codes, scale = quantize_tokens(x)
    weight = operand.codes[:, : operand.k].t()
    return ops.cutlass_scaled_mm(codes, weight, scale_a=scale, scale_b=operand.scale, out_dtype=x.dtype, bias=bias)


def _prepare_cpu_engine(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> CpuOperand:
    """The calls of vLLM's `CPUInt8ScaledMMLinearKernel.process_weights_for_onednn`, symmetric and dynamic per token."""
    from vllm import _custom_ops as ops

    w = weight.t()
    azp_adj = w.sum(dim=0, keepdim=True, dtype=torch.float32) * scale.squeeze(-1)
    return CpuOperand(ops.create_onednn_scaled_mm(w, scale, dtype, True, False, 32), scale, azp_adj)


def _product_cpu_engine(x: Tensor, operand: CpuOperand, bias: Tensor | None) -> Tensor:
    """The calls of vLLM's `CPUInt8ScaledMMLinearKernel._apply_weights_onednn`."""
    from vllm import _custom_ops as ops

    codes, scale, zero_point = ops.onednn_scaled_int8_quant(x.contiguous(), None, None, True)
    y = torch.empty(len(x), operand.handler.n, dtype=x.dtype)
    ops.onednn_scaled_mm(operand.handler, codes, y, scale, zero_point, operand.azp_adj, bias)
    return y
