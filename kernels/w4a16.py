"""w4a16: int4 weights in groups along K that share a bfloat16 scale; inputs stay as they are.

A dequantized weight is bf16(code) · bf16(scale) rounded to bfloat16, whatever the inputs' dtype: so do Marlin (GPU) and
vLLM's `cpu_gemm_wna16` (CPU; read off it with an identity input, equal bit for bit). The latter takes 16-bit inputs
only, so a float32 learner on CPU has no engine to equal: it multiplies the same bfloat16 values in float32.

This is the definition and the backend `emulated`. Every division is by a tensor: on CUDA torch multiplies by the
reciprocal of a Python number, which is another float now and then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qarl.kernels.routing import spans

Codes = dict[str, Tensor]

_PER_WORD = 8
"""Codes in one int32."""


@torch.no_grad()
def quantize(weight: Tensor, group: int | None) -> Codes:
    """weight [*, N, K] -> `weight_packed` int32 [*, N, K/8], `weight_scale` bfloat16 [*, N, K/group] = absmax/7.5.

    Cast to bfloat16 first; codes in -8…7. w / scale is rounded to bfloat16 before it is rounded to a code, as it is in
    `compressed-tensors`. An all-zero group (or one whose scale underflows) gets scale 1; one with NaN or inf gets that
    scale and dequantizes to NaN. Raises `ValueError` where the group does not divide K.
    """
    n_groups = _groups(weight.shape[-1], group)
    w = weight.to(torch.bfloat16).unflatten(-1, (n_groups, -1))
    absmax = w.abs().amax(-1, keepdim=True)
    scale = absmax / absmax.new_full((), 7.5)
    scale = torch.where(scale == 0, 1.0, scale)
    codes = (w / scale).round_().clamp_(-8, 7).nan_to_num_(0).to(torch.int8)
    return {"weight_packed": pack(codes.flatten(-2)), "weight_scale": scale.squeeze(-1)}


def quantize_into(weight: Tensor, group: int | None, out: Codes) -> None:
    """`quantize`, written into these parts."""
    for part, values in quantize(weight, group).items():
        out[part].copy_(values)


def dequantize(codes: Codes, group: int | None, dtype: torch.dtype) -> Tensor:
    """Ŵ [*, N, K] = code · scale rounded to bfloat16, then cast to `dtype`."""
    values = unpack(codes["weight_packed"]).to(torch.bfloat16)
    n_groups = _groups(values.shape[-1], group)
    return (values.unflatten(-1, (n_groups, -1)) * codes["weight_scale"].unsqueeze(-1)).flatten(-2).to(dtype)


def columns(codes: Codes, group: int | None, at: Tensor) -> Tensor:
    """float32 [*, N, C]: the columns `at` int64 [C] of Ŵ, without the rest of it."""
    packed, scale = codes["weight_packed"], codes["weight_scale"]
    width = 32 // _PER_WORD
    values = ((packed[..., at // _PER_WORD] >> (width * (at % _PER_WORD)).to(torch.int32)) & 15) - 8
    return (values.to(torch.bfloat16) * scale[..., at // (_PER_WORD * packed.shape[-1] // scale.shape[-1])]).float()


def pack(codes: Tensor) -> Tensor:
    """int8 [*, K] in -8…7 -> int32 [*, K/8]: code + 8 in four bits, the first code in the lowest (`pack_to_int32`)."""
    nibbles = (codes.to(torch.int32) + 8).unflatten(-1, (-1, _PER_WORD))
    return (nibbles << _shifts(codes)).sum(-1, dtype=torch.int32)


def unpack(packed: Tensor) -> Tensor:
    """int32 [*, K/8] -> int8 [*, K] in -8…7."""
    nibbles = (packed.unsqueeze(-1) >> _shifts(packed)) & 15
    return (nibbles - 8).flatten(-2).to(torch.int8)


@dataclass(frozen=True)
class Operand:
    """Codes, dequantized anew in every product: a 16-bit copy kept of each would be a second model."""

    codes: Codes
    group: int | None

    def matrix(self, dtype: torch.dtype, expert: int | None = None) -> Tensor:
        codes = self.codes if expert is None else {part: tensor[expert] for part, tensor in self.codes.items()}
        return dequantize(codes, self.group, dtype)


def prepare(codes: Codes, group: int | None, dtype: torch.dtype) -> Operand:
    """Codes as the products want them. A matrix, or E experts [E, N, K/8]."""
    return Operand(codes, group)


def product(x: Tensor, operand: Operand, bias: Tensor | None = None) -> Tensor:
    """y [M, N] in x's dtype, from x [M, K] and bias [N]. M may be 0."""
    return F.linear(x, operand.matrix(x.dtype), bias)


def grouped_product(x: Tensor, operand: Operand, offsets: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """y [M, N] in x's dtype, from x [M, K] with rows sorted by expert, `offsets` [E] where those of each end.

    Rows after the last offset are 0. `row_weights` [M] float32: as in Marlin, weight and product are each rounded to x's
    dtype before they are multiplied.
    """
    y = x.new_zeros(len(x), operand.codes["weight_packed"].shape[1])
    for expert, rows in spans(offsets):
        y[rows] = F.linear(x[rows], operand.matrix(x.dtype, expert))
        if row_weights is not None:
            y[rows] *= row_weights[rows, None].to(y.dtype)
    return y


def refusal(device_type: str, dtype: torch.dtype) -> str | None:
    """Why it does not run on that device for inputs of `dtype`: it always does."""
    return None


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(0, 32, 32 // _PER_WORD, dtype=torch.int32, device=like.device)


def _groups(k: int, group: int | None) -> int:
    if not group or group % _PER_WORD or k % group:
        raise ValueError(
            f"w4a16 needs a group that divides the input features and is a multiple of 8; got group {group}, K {k}"
        )
    return k // group
