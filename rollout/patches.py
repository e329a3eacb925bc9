"""What we change in vLLM, each change with the versions it is for. Called before an engine starts; says so when it acts."""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import torch

from qarl.errors import ConfigError
from qarl.kernels.w8a8_fp8_engine import LEAST_ROWS
from qarl.rollout.int8_experts import int8_experts_class

logger = logging.getLogger(__name__)

ON_GPU, ON_CPU = "0.26", "0.32"
"""vLLM's series that the patches were written for and run with."""


@functools.cache  # twice is once
def apply() -> None:
    """All patches that vLLM needs on this machine. Raises `ConfigError` for a vLLM they are not for, before any acts."""
    if torch.cuda.is_available():
        require_version(ON_GPU)
        _norms()
        if torch.cuda.get_device_capability()[0] == 9:
            _fp8_rows()
            _fp8_experts()
            _narrow_heads()
        _int8_experts()
        _int4_experts()
    elif torch.cpu._is_amx_tile_supported():
        require_version(ON_CPU)
        _int8_in_float32()


def require_version(series: str) -> None:
    """Raise `ConfigError` unless vLLM is of this series: patched names may mean something else in another, or nothing."""
    import vllm

    if not vllm.__version__.startswith(f"{series}."):
        raise ConfigError(
            f"rollout.engine: vllm {vllm.__version__} is not the {series} that its patches are for; install vllm=={series}.*, or "
            "take rollout.engine=torch"
        )


def _norms() -> None:
    """0.26: a row longer than 2048 is normed in an order that depends on how many rows there are, so that no learner, whose
    batches are long, can repeat what a token was normed to when it was decoded. Here every norm is the learner's."""
    from vllm.model_executor.layers.layernorm import RMSNorm

    from qarl.kernels import norm_fused

    def forward_cuda(self: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if not self.has_weight or self.variance_size_override is not None:
            raise NotImplementedError("a norm without weights, or of a part of its row, is not known to the learner")
        if residual is None:
            return norm_fused.rms_norm(x, self.weight.data, self.variance_epsilon)
        return norm_fused.add_rms_norm(x, residual, self.weight.data, self.variance_epsilon)

    RMSNorm.forward_cuda = forward_cuda  # type: ignore[method-assign]
    logger.warning("vLLM's norms depend on the batch: replaced by the learner's")


def _fp8_rows() -> None:
    """0.26: few rows, as in decoding, are multiplied in e4m3 by kernels whose last bit differs from those for many.

    Here they are padded until the kernels for many take them (`LEAST_ROWS`). The padding is allocated, not written: what a
    row holds reaches no other, so the op that quantizes the rows may leave it as it was, and no kernel is added to a step.
    """
    from vllm.model_executor.kernels.linear.scaled_mm.cutlass import CutlassFP8ScaledMMLinearKernel as Kernel

    compute = Kernel.apply_scaled_mm

    def apply_scaled_mm(self: Any, *, A: torch.Tensor, output_shape: list[int], **others: Any) -> torch.Tensor:
        """A: [max(rows, LEAST_ROWS), K]; its scales alike."""
        *rows, n_outputs = output_shape
        y = compute(self, A=A, output_shape=[len(A), n_outputs], **others)
        return y[: math.prod(rows)].view(*rows, y.shape[-1])

    Kernel.get_output_padding = lambda self: LEAST_ROWS  # type: ignore[method-assign]
    Kernel.apply_scaled_mm = apply_scaled_mm  # type: ignore[method-assign]
    logger.warning("vLLM multiplies few rows in e4m3 by other kernels than many: padded to %d rows", LEAST_ROWS)


def _fp8_experts() -> None:
    """0.26: some of its tuned tables hold tiles of 16 rows by 32 columns, for the few rows of decoding. Triton multiplies e4m3 in
    them as float16, in every other tile as e4m3, whose sums are others in the last bits (kernels/products_fused.py). Here the
    narrowest tile has 64 columns."""
    from vllm.model_executor.layers.fused_moe.experts import triton_moe

    narrowest = 64
    choose = triton_moe.try_get_optimal_moe_config

    def try_get_optimal_moe_config(
        w1_shape: Any, w2_shape: Any, top_k: int, dtype: str | None, n_tokens: int, **others: Any
    ) -> dict[str, int]:
        tile = choose(w1_shape, w2_shape, top_k, dtype, n_tokens, **others)
        if dtype == "fp8_w8a8":
            tile = tile | {"BLOCK_SIZE_N": max(tile["BLOCK_SIZE_N"], narrowest)}
        return tile

    vars(triton_moe).update(try_get_optimal_moe_config=try_get_optimal_moe_config)
    logger.warning(
        "vLLM may multiply few rows of e4m3 experts as float16: its tiles have %d columns or more now", narrowest
    )


def _narrow_heads() -> None:
    """0.26: FlashAttention-3 sums over keys in other blocks where a step has few queries, as in decoding, if heads are narrow.

    Here such models declare a longest query of 65 tokens or more, in planning a step and in computing it, which makes all
    blocks those of a prefill (kernels/attention.py). To the kernel it is a bound: it reads the true lengths on the device.
    vLLM chooses a step's graph elsewhere, by its own copy.
    """
    from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadataBuilder as Builder

    least, widest = 65, 64
    build = Builder.build

    def declared(self: Any, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        if self.headdim <= widest:
            longest = max(common_attn_metadata.max_query_len, least)
            common_attn_metadata = common_attn_metadata.replace(max_query_len=longest)  # others keep theirs
        return build(self, common_prefix_len, common_attn_metadata, fast_build)

    Builder.build = declared  # type: ignore[method-assign]
    logger.warning(
        "vLLM's attention decodes heads of up to %d in other blocks than it prefills: told of %d queries", widest, least
    )


def _int8_experts() -> None:
    """0.26: int8 experts with dynamic activations silently leave their activations in bfloat16.

    Their quantization config is made by whether a static input scale is there, which per-token scales never are, and the
    Triton experts refuse int8 rows besides. Here the config says what it should, and the experts quantize rows with the op
    of the dense layers. Later versions quantize in Triton, which rounds halves away from zero: another arithmetic than a
    learner follows, refused rather than left alone. Asked of vLLM itself rather than of its version.
    """
    import vllm
    from vllm.model_executor.layers.fused_moe.config import int8_w8a8_moe_quant_config
    from vllm.model_executor.layers.fused_moe.oracle import int8 as oracle
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w8a8_int8 as method,
    )

    one = torch.ones(1, 1, 1)
    made = method.make_int8_moe_quant_config(oracle.Int8MoeBackend.TRITON, one, one, per_act_token_quant=True)
    if made.use_int8_w8a8:
        raise ConfigError(
            f"rollout.engine: vllm {vllm.__version__} quantizes the rows of int8 experts by itself, and rounds them otherwise "
            "than its dense layers do; on a GPU install vllm==0.26.*"
        )

    select = method.select_int8_moe_backend

    def select_int8_moe_backend(*args: Any, **kwargs: Any) -> tuple[Any, type]:
        backend, experts = select(*args, **kwargs)
        if backend is not oracle.Int8MoeBackend.TRITON:
            raise ValueError(f"int8 experts run in vLLM's Triton kernel here, but {backend} was selected")
        return backend, int8_experts_class(experts)

    def make_int8_moe_quant_config(
        int8_backend: Any, w1_scale: torch.Tensor, w2_scale: torch.Tensor, per_act_token_quant: bool, **_: Any
    ) -> Any:
        return int8_w8a8_moe_quant_config(w1_scale, w2_scale, None, None, per_act_token_quant=per_act_token_quant)

    vars(method).update(
        select_int8_moe_backend=select_int8_moe_backend, make_int8_moe_quant_config=make_int8_moe_quant_config
    )
    logger.warning("vLLM would leave the activations of int8 experts in bfloat16: patched to quantize them per token")


def _int4_experts() -> None:
    """0.26 to 0.32: Marlin's experts get the scales of w13 in another order than its kernel reads them.

    There is one order for several groups along the inputs and one for a single group. vLLM chooses by the number of inputs,
    and takes w2's (a rank's intermediate size) for w13's (the hidden size). Both lie beyond a group in most models; where
    one does not, columns are served with each other's scales. Here the number follows from the scales themselves.
    """
    from vllm.model_executor.layers.fused_moe.oracle import int_wna16 as oracle

    permute = oracle.marlin_moe_permute_scales

    def marlin_moe_permute_scales(
        s: torch.Tensor, size_k: int, size_n: int, group_size: int, is_a_8bit: bool = False
    ) -> torch.Tensor:
        """s: [E, K / group, N]."""
        if group_size > 0:
            size_k = s.shape[1] * group_size
        return permute(s, size_k, size_n, group_size, is_a_8bit)

    vars(oracle).update(marlin_moe_permute_scales=marlin_moe_permute_scales)
    logger.warning(
        "vLLM would serve int4 experts of a single group with scales out of order: patched to go by the scales"
    )


def _int8_in_float32() -> None:
    """0.32: on a CPU with AMX dense int8 layers get a kernel that takes 16-bit rows only, chosen by the weight's dtype alone: a
    model in float32 fails at its first product. Here such a model keeps oneDNN's kernel, as on CPUs without AMX."""
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.kernels.linear.scaled_mm import cpu

    fits = cpu.check_cpu_sgl_kernel

    def check_cpu_sgl_kernel(n: int, k: int, dtype: torch.dtype) -> bool:
        return fits(n, k, dtype) and get_current_vllm_config().model_config.dtype != torch.float32

    vars(cpu).update(check_cpu_sgl_kernel=check_cpu_sgl_kernel)
    logger.warning("vLLM's int8 kernel for AMX takes no float32: models in float32 keep oneDNN's")
