"""Which formats this machine's vLLM runs, asked of its own operators before an engine is built.

On a CPU that depends on the instruction set and on the dtype of activations, in ways that no version number tells, so each
format's product is run once, on a matrix of a few kilobytes. Imports vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig

from qarl import formats
from qarl.errors import ConfigError
from qarl.formats import QuantFormat
from qarl.shapes import check_ranks


def supported_formats(dtype: str, experts: bool = False) -> dict[str, str | None]:
    """Format -> `None` where it runs here, else the reason. `dtype`: of activations; `experts`: the model has packed ones."""
    refuse = _refuse_on_gpu if torch.cuda.is_available() else _refuse_on_cpu
    return {name: refuse(format, getattr(torch, dtype), experts) for name, format in formats.FORMATS.items()}


def require_format(
    format: QuantFormat, path: str | Path, dtype: str, ranks: int = 1, revision: str | None = None
) -> None:
    """Raise `ConfigError` where this machine's vLLM cannot run the format, naming what it can, or so many ranks not share it."""
    config = AutoConfig.from_pretrained(path, revision=revision)
    if ranks > 1:
        check_ranks(config.to_dict(), format, ranks)
    experts = bool(getattr(config, "num_experts", 0))
    reasons = supported_formats(dtype, experts)
    if experts and format.weight == "int4" and torch.cuda.is_available() and config.hidden_size % 128:
        # vLLM would take other kernels, of other arithmetic and layout, without a word.
        reasons[format.name] = f"Marlin's experts need a hidden size divisible by 128, got {config.hidden_size}"
    if experts and format.weight == "int4" and torch.cuda.is_available() and config.moe_intermediate_size // ranks % 64:
        width = config.moe_intermediate_size // ranks
        reasons[format.name] = f"Marlin's experts need a width divisible by 64, got {width} on each of {ranks} ranks"
    if reason := reasons[format.name]:
        runs = sorted(name for name, why in reasons.items() if why is None)
        raise ConfigError(
            f"rollout.format: {format.name!r} does not run in this machine's vLLM with model.dtype={dtype} ({reason}); "
            f"it runs {runs}, and rollout.engine=torch runs every format (python -m qarl.doctor tries them all)"
        )


def _refuse_on_cpu(format: QuantFormat, dtype: torch.dtype, experts: bool) -> str | None:
    if not format.quantizes:
        return None
    if experts:
        # int8 and int4 ones run with AMX, but in one op, which shows none of what a refill has to prove.
        return f"on a CPU no {format.weight} experts of vLLM's can be refilled and proved"
    probes: dict[str, Callable[[torch.dtype], None]] = {"int8": _int8, "e4m3": _e4m3, "int4": _int4}
    try:
        probes[format.weight](dtype)
    except (NotImplementedError, AttributeError, RuntimeError) as error:
        return str(error).strip().splitlines()[0]
    return None


def _refuse_on_gpu(format: QuantFormat, dtype: torch.dtype, experts: bool) -> str | None:
    """By compute capability, as vLLM's own schemes and kernels do: ampere for FlashAttention and Marlin, ada for e4m3.

    Experts run wherever dense layers do: in Triton (bf16, int8, e4m3) or Marlin (int4).
    """
    if dtype == torch.float32:
        return "FlashAttention takes model.dtype=bfloat16"
    needed = 89 if format.weight == "e4m3" else 80
    major, minor = torch.cuda.get_device_capability()
    has = major * 10 + minor
    if has < needed:
        return f"needs compute capability {needed / 10}, this GPU has {has / 10}"
    if format.weight == "int8" and major >= 10:
        return "vLLM has no int8 product for this GPU generation"
    return None


def _int8(dtype: torch.dtype) -> None:
    from vllm import _custom_ops as ops

    weight = torch.ones(32, 32, dtype=torch.int8)
    handler = ops.create_onednn_scaled_mm(weight.t(), torch.ones(32, 1), dtype, True, False, 32)
    codes, scale, zero = ops.onednn_scaled_int8_quant(torch.ones(1, 32, dtype=dtype), None, None, True)
    ops.onednn_scaled_mm(handler, codes, torch.empty(1, 32, dtype=dtype), scale, zero, torch.zeros(1, 32), None)


def _e4m3(dtype: torch.dtype) -> None:
    one = torch.ones(())
    codes = torch.ones(32, 32).to(torch.float8_e4m3fn)
    torch._scaled_mm(codes[:1], codes.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)


def _int4(dtype: torch.dtype) -> None:
    from vllm import _custom_ops as ops

    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        raise NotImplementedError("cpu_gemm_wna16 is missing: it needs a CPU with AVX-512 or AMX")
    isa = "amx" if torch.cpu._is_amx_tile_supported() and dtype == torch.bfloat16 else "vec"
    weight = torch.zeros(2, 32 * 16 // 8, dtype=torch.int32)  # [N / 16, K · 16 / 8]
    ops.cpu_gemm_wna16(torch.ones(1, 32, dtype=dtype), weight, torch.ones(1, 32, dtype=dtype), None, None, 8, isa)
