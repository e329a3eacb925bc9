"""Compiles `w4a16_few_fused` for a Hopper, which need not be there, with groups of every kind."""

import inspect

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qarl.kernels.w4a16_few_fused import _FEW, _WORDS, _few_rows_kernel

POINTERS = {"x": "*bf16", "packed": "*i32", "scales": "*bf16", "y": "*bf16", "row_weights": "*fp32", "table": "*i32"}

for group, rows in ((8, 16), (32, 16), (128, 16), (256, 16), (128, 1)):
    constants = {
        "GROUP": group,
        "WEIGHTED": group < 100,
        "BLOCK_M": _FEW,
        "BLOCK_N": 128,
        "WORDS": _WORDS,
        **({"M": rows} if rows == 1 else {}),  # Triton makes every argument of 1 a constant
    }
    names = inspect.signature(_few_rows_kernel.fn).parameters
    types = {name: "constexpr" if name in constants else POINTERS.get(name, "i32") for name in names}
    source = ASTSource(_few_rows_kernel, types, constexprs=constants)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 3})
