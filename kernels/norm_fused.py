"""Root-mean-square norm in Triton, the same bits for a row whatever rows are beside it.

vLLM's own kernels add the squares of rows longer than 2048 in an order that depends on how many rows there are, so that a token
decoded among few is normed to other bits than in a learner's long batch; a last bit is enough to round an activation to
another code. This kernel adds in an order that depends on the length of a row alone. Engine and learner both run it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@torch.no_grad()
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [*, D], weight [D] of one dtype: x / sqrt(mean x² + eps) rounded to it, times the weight, rounded again.

    x may be a view whose last dimension is contiguous (heads of a wider row): it is not copied.
    """
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel():
        rows = x if x.dim() == 3 else x.reshape(-1, 1, x.shape[-1])
        _launch(rows, rows, y, weight, eps, add=False)
    return y


@torch.no_grad()
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum as rounded) of x and residual [*, D], contiguous; both are written in place and returned."""
    if x.numel():
        rows, kept = (tensor.view(-1, 1, tensor.shape[-1]) for tensor in (x, residual))
        _launch(rows, kept, x, weight, eps, add=True)
    return x, residual


def _launch(x: Tensor, residual: Tensor, y: Tensor, weight: Tensor, eps: float, add: bool) -> None:
    """x [T, H, D] with any strides but the last; residual like it; y contiguous."""
    tokens, heads, width = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    block = triton.next_power_of_2(width)
    rows = max(1, 2048 // block)  # of a program; by the width alone, as the order of the sum has to be
    warps = min(max(rows * block // 512, 1), 16)
    with torch.cuda.device_of(y):
        _norm[(triton.cdiv(tokens * heads, rows),)](
            x,
            residual,
            y,
            weight,
            tokens * heads,
            heads,
            x.stride(0),
            x.stride(1),
            eps,
            width,
            rows,
            block,
            add,
            num_warps=warps,
            enable_fp_fusion=False,  # with and without the addition the compiler might fuse other pairs
        )


@triton.jit(do_not_specialize=["n_rows"])  # one program for every number of rows, compiled once
def _norm(
    x_ptr,
    residual_ptr,
    y_ptr,
    weight_ptr,
    n_rows,
    heads,
    token_stride,
    head_stride,
    eps,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < n_rows)[:, None] & (column < WIDTH)[None, :]
    at = ((row // heads) * token_stride + (row % heads) * head_stride)[:, None] + column[None, :]
    out = row[:, None] * WIDTH + column[None, :]
    dtype = y_ptr.dtype.element_ty
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        total = (x + tl.load(residual_ptr + out, mask=inside, other=0.0).to(tl.float32)).to(dtype)
        tl.store(residual_ptr + out, total, mask=inside)
        x = total.to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, axis=1) / WIDTH + eps)
    normalized = (x * factor[:, None]).to(dtype).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    tl.store(y_ptr + out, (normalized * weight[None, :]).to(dtype), mask=inside)
