"""bf16: nothing is quantized. For packed experts all the same: their rows move twice as fast our way as transformers'.

What experts ask of a backend, with the weight in the place of its codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qarl.kernels.routing import clear_after, spans

Codes = dict[str, Tensor]


def quantize(weight: Tensor, group: int | None = None) -> Codes:
    """The weight itself."""
    return {"weight": weight}


def dequantize(codes: Codes, group: int | None, dtype: torch.dtype) -> Tensor:
    """The weight itself, in `dtype`."""
    return codes["weight"].to(dtype)


def prepare(codes: Codes, group: int | None, dtype: torch.dtype) -> Tensor:
    """The weight itself, a matrix or E experts."""
    return codes["weight"]


def grouped_product(x: Tensor, operand: Tensor, offsets: Tensor, row_weights: Tensor | None = None) -> Tensor:
    """y [M, N] from x [M, K] with rows sorted by expert, `offsets` int32 [E] where those of each end; 0 for rows after the last.

    `row_weights` [M] float32 multiply the rounded result, which is rounded again: in bfloat16 transformers' own bits where they
    are bfloat16 numbers. Waits for the device off CUDA alone.
    """
    if x.is_cuda and len(x):
        y = torch._grouped_mm(x, operand.transpose(-2, -1), offs=offsets.to(torch.int32))
        y = y.contiguous()  # rows lie apart where N is no multiple of 8
        return clear_after(y if row_weights is None else y.mul_(row_weights[:, None]), offsets)
    y = x.new_zeros(len(x), operand.shape[-2])
    for expert, rows in spans(offsets):
        y[rows] = x[rows] @ operand[expert].t()
        if row_weights is not None:
            y[rows] *= row_weights[rows, None]
    return y
