"""How vLLM is set up: environment, model class, the format as its config says it, and the kernels it runs on a GPU."""

from __future__ import annotations

import os
from typing import Any

import torch

from qarl.errors import ConfigError
from qarl.formats import QuantFormat

#: Read by vLLM when it is imported or started. In one process, workers share the learner's view of devices and die with it.
NUMBERS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core is refilled in this process
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # it divides logits by the temperature in bfloat16, and takes dense models only
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # it cannot tell the log-probs it sampled from
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",  # ranks are summed by NCCL, in batches of any size
    "VLLM_USE_DEEP_GEMM": "0",  # not one of our kernels, yet warmed up where it is there
}
"""vLLM's variables that its numbers, or the way we run it, depend on."""
HABITS = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two engines bound to the same core would starve each other
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # by one token; `Engine` checks the context itself
}
"""Others, which may be set otherwise."""
ENVIRONMENT = NUMBERS | HABITS

#: format's grid -> vLLM's kernels for linear layers and for experts, on a GPU. Named, so that vLLM raises where it cannot.
_GPU_KERNELS = {
    "bf16": {"moe_backend": "triton"},
    "int8": {"linear_backend": "cutlass", "moe_backend": "triton"},
    "e4m3": {"linear_backend": "cutlass", "moe_backend": "triton"},
    "int4": {"linear_backend": "marlin", "moe_backend": "marlin"},
}


def gpu_settings(format: QuantFormat, max_sequences: int, most_tokens: int) -> dict[str, Any]:
    """What makes vLLM compute as `VllmEngine` says. Names and meanings are those of vLLM 0.26."""
    # Graphs are captured up to the number of sequences. vLLM bounds attention's splits in batches up to the largest
    # size only, so that one is as large as any batch.
    sizes = {1, 2, 4, *range(8, max_sequences, 8), max_sequences}
    attention: dict[str, Any] = {"backend": "FLASH_ATTN", "flash_attn_max_num_splits_for_cuda_graph": 1}
    if torch.cuda.get_device_capability()[0] == 9:
        attention["flash_attn_version"] = 3
    return {
        "compilation_config": {
            "mode": 0,
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": sorted({s for s in sizes if s <= max_sequences} | {most_tokens}),
            "custom_ops": ["all"],
        },
        "optimization_level": 0,  # no fusion passes, no tuning at start; the graphs above stay
        "attention_config": attention,
        "disable_cascade_attn": True,
        **_GPU_KERNELS[format.weight],
    }


def set_environment() -> None:
    """Give vLLM its variables. Raises `ConfigError` where one of those that numbers depend on was set otherwise."""
    for name, value in NUMBERS.items():
        if os.environ.setdefault(name, value) != value:
            raise ConfigError(
                f"environment variable {name}: {os.environ[name]!r} would make vLLM compute or run otherwise than a learner can "
                f"follow; unset it, or choose {value!r}"
            )
    for name, value in HABITS.items():
        os.environ.setdefault(name, value)


def register_here(path: str, revision: str | None = None) -> None:
    """Let vLLM look at the model class in this process. It starts another one for that, which takes as long as it does to
    import vLLM, so that CUDA stays untouched before it forks; we never fork."""
    from transformers import AutoConfig
    from vllm.model_executor.models.registry import ModelRegistry

    for architecture in AutoConfig.from_pretrained(path, revision=revision).architectures or ():
        if architecture in ModelRegistry.models:
            ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())


_SCHEMES: dict[str, dict[str, Any]] = {
    "int8": {"format": "int-quantized", "num_bits": 8, "type": "int"},
    "e4m3": {"format": "float-quantized", "num_bits": 8, "type": "float"},
    "int4": {"format": "pack-quantized", "num_bits": 4, "type": "int"},
}


def quantization_override(format: QuantFormat) -> dict[str, Any]:
    """What a compressed-tensors checkpoint at this format would say in its `config.json`; nothing for `bf16`."""
    if not format.quantizes:
        return {}
    scheme = dict(_SCHEMES[format.weight])
    layout = scheme.pop("format")
    weights = scheme | {"symmetric": True, "dynamic": False}
    weights |= {"strategy": "group", "group_size": format.group} if format.group else {"strategy": "channel"}
    inputs = None
    if format.activation != "none":
        inputs = {"num_bits": 8, "type": scheme["type"], "strategy": "token", "symmetric": True, "dynamic": True}
    # Norms and embeddings are no `Linear` and need no mention.
    ignored = ["lm_head", "re:.*\\.gate$"]
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": layout,
            "quantization_status": "compressed",
            "ignore": ignored,
            "config_groups": {"group_0": group},
        }
    }
