"""What a run will need, from its configuration alone: memory and placement, device by device. No torch.

Weights, gradients, optimizer state, published codes and the engine's weights are counted from the architecture, what an optimizer
step holds besides by what was measured (ZeRO-1) or read (ZeRO-3); what is left on each device goes to activations and the KV cache,
and a plan that leaves less than nothing says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from qarl import formats
from qarl.config import RunConfig
from qarl.fusion import engine_name, is_summed, module_of
from qarl.shapes import architecture, check_ranks, parameter_shapes

GB = 1e9
#: Bytes of optimizer state for each weight, beside the FP32 master: moments.
MOMENTS = {"adamw": 8, "muon": 4, "adamw_8bit": 2}
#: Bytes of one FP32 number: a gradient, a master, a temporary of AdamW's step.
FP32 = 4
#: Weights of a rank that ZeRO-3 steps at a time (DeepSpeed's `sub_group_size`), billions.
SUB_GROUP = 1.0


@dataclass(frozen=True)
class Memory:
    """Gigabytes on one device."""

    weights: float
    gradients: float
    """In FP32, as DeepSpeed is told to add them up."""
    masters: float
    """DeepSpeed's own FP32 copy, of FP32 weights too."""
    moments: float
    step: float
    """What is live besides while the optimizer steps: a temporary of AdamW's, and gradients in the model's dtype. So ZeRO-1 on one
    rank holds 24 bytes a weight of a BF16 model, as was measured on an H200 (24.03 at the peak of a step, two models,
    where DeepSpeed reduced gradients in the model's dtype: benchmarks/results/learner_h200.json). Under ZeRO-3, by its code: a
    temporary and a copy of the gradient, a group at a time."""
    gathered: float
    """The largest decoder layer, whole, in the model's dtype: what ZeRO-3 holds while it computes."""
    codes: float
    """Buffers for published codes on their way to engines; below ZeRO-3 also the codes that the learner computes with, kept for a
    step. Engines on GPUs of their own have such buffers too, taken from what the KV cache leaves."""
    engine: float
    kv_cache: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


#: `RunConfig.carrier` -> how published weights travel
_WAYS = {
    "host": "all of it passes through host memory on its way",
    "ipc": "read in place by engines that share a rank's GPU, through two staging buffers",
    "broadcast": "broadcast by NCCL, all of it to every GPU, through two staging buffers on each",
}


def learner_memory(config: RunConfig, shapes: dict[str, tuple[int, ...]]) -> Memory:
    """Of one learner rank. The ZeRO stage says which part is divided among the ranks: 1 optimizer, 2 gradients, 3 weights."""
    weights = sum(map(math.prod, shapes.values()))
    layers: dict[str, int] = {}
    for name, shape in shapes.items():
        if name.startswith("model.layers."):
            layer = name.split(".")[2]
            layers[layer] = layers.get(layer, 0) + math.prod(shape)
    width = 2 if config.model.dtype == "bfloat16" else 4
    zero, ranks = config.learner.zero, config.learner.ranks

    def share(stage: int) -> float:
        return weights / GB / (ranks if zero >= stage else 1)

    return Memory(
        weights=width * share(3),
        gradients=FP32 * share(2),
        masters=(FP32 if zero else 0) * share(1),
        moments=MOMENTS[config.learner.optimizer.name] * share(1),
        step=2 * FP32 * min(share(3), SUB_GROUP)
        if zero == 3
        else FP32 * share(1) + (2 * share(2) if width == 2 else 0),
        gathered=width * max(layers.values(), default=0) / GB if zero == 3 else 0.0,
        codes=staging(config, shapes) + _kept_codes(config, shapes),
        engine=0.0,
        kv_cache=0.0,
    )


def _kept_codes(config: RunConfig, shapes: dict[str, tuple[int, ...]]) -> float:
    """Gigabytes of the codes that the aligned forward keeps from one optimizer step to the next."""
    if config.learner.zero == 3 or config.learner.backend == "none":
        return 0.0
    format, ranks = formats.get(config.rollout.format), config.rollout.tensor_parallel
    covered = {n: math.prod(s) * format.bits_per_weight(s) for n, s in shapes.items() if format.covers(n, s)}
    shares = sum(bits for name, bits in covered.items() if ranks > 1 and is_summed(name))  # cut, beside the whole
    return (sum(covered.values()) + shares) / 8 / GB


def engine_weights(config: RunConfig, shapes: dict[str, tuple[int, ...]]) -> float:
    """Gigabytes of the sampler's weights, all of them, scales counted."""
    format = formats.get(config.rollout.format)
    width = 2 if config.model.dtype == "bfloat16" else 4
    bits = sum(
        math.prod(s) * (format.bits_per_weight(s) if format.covers(n, s) else 8 * width) for n, s in shapes.items()
    )
    return bits / 8 / GB


def staging(config: RunConfig, shapes: dict[str, tuple[int, ...]]) -> float:
    """Gigabytes of two buffers of the largest engine module, in which weights travel; see `qarl.transfer`."""
    modules: dict[str, float] = {}
    for name, shape in shapes.items():
        module = module_of(engine_name(name)[0])
        modules[module] = modules.get(module, 0.0) + engine_weights(config, {name: shape})
    return 2 * max(modules.values(), default=0.0)


def engine_memory(config: RunConfig, shapes: dict[str, tuple[int, ...]]) -> Memory:
    """Of one GPU of an engine."""
    weights = engine_weights(config, shapes) / config.rollout.tensor_parallel
    if config.rollout.kv_cache_gb is not None:
        cache = config.rollout.kv_cache_gb
    else:
        cache = config.rollout.gpu_memory * config.placement.gpu_gb - weights if config.placement.gpus else 1.0
    return Memory(0, 0, 0, 0, 0, 0, 0, engine=weights, kv_cache=cache)


def plan(config: RunConfig) -> str:
    """The plan as text. Raises `ConfigError` where the format does not fit the architecture."""
    format = formats.get(config.rollout.format)
    lines = [f"run {config.name}: {config.steps} steps", f"format {format.name}"]
    found = architecture(config.model)
    if found is None:
        return "\n".join([*lines, f"model {config.model.path or config.model.gguf}: known once it is loaded"])
    shapes = parameter_shapes(found)
    for name, shape in shapes.items():
        format.check_shape(name, shape)
    if config.rollout.tensor_parallel > 1:
        check_ranks(found, format, config.rollout.tensor_parallel)
    lines[1] += f": {formats.coverage(format, shapes)}"
    lines.insert(1, f"model {config.model.path or 'pocket'}: {sum(map(math.prod, shapes.values())) / GB:.3g} B weights")
    algorithm, learner, rollout = config.algorithm, config.learner, config.rollout
    lines += [
        f"step: {algorithm.prompts} prompts x {algorithm.group} completions of up to {rollout.sampling.max_tokens} tokens, "
        f"{algorithm.mini_batches} optimizer steps",
        f"learner: {learner.ranks} x ZeRO-{learner.zero}, {learner.optimizer.name}, micro-batches of {learner.tokens} tokens",
        f"engine: {rollout.replicas} x {rollout.engine}, tensor parallel {rollout.tensor_parallel}",
        f"sync: {engine_weights(config, shapes):.3g} GB on the wire ({2 * sum(map(math.prod, shapes.values())) / GB:.3g} as BF16)",
        f"      {_WAYS[config.carrier]}",
        "not counted: start-up, where every learner rank reads the whole model",
        "",
        *_table(config, learner_memory(config, shapes), engine_memory(config, shapes)),
    ]
    return "\n".join(lines)


def _table(config: RunConfig, learner: Memory, engine: Memory) -> list[str]:
    """Rows of GB a device, and whether it fits."""
    colocated = config.placement.mode == "colocate"
    devices = {"learner + engine": (learner, engine)} if colocated else {"learner": (learner,), "engine": (engine,)}
    rows = []
    for device, parts in devices.items():
        rows.append(f"GB on each device of {device}")
        sums = {field: sum(getattr(part, field) for part in parts) for field in vars(learner)}
        rows += [f"  {field:<10} {gigabytes:9.3f}" for field, gigabytes in sums.items() if gigabytes]
        total = sum(sums.values())
        if not config.placement.gpus:
            rows.append(f"  {'total':<10} {total:9.3f}  in host memory")
            continue
        left = config.placement.gpu_gb - total
        verdict = f"{left:.1f} left for activations" if left > 0 else f"DOES NOT FIT by {-left:.1f}"
        if sums["kv_cache"] < 0:
            verdict = f"DOES NOT FIT: rollout.gpu_memory is {-sums['kv_cache']:.1f} too little for the engine's weights"
        rows.append(f"  {'total':<10} {total:9.3f}  of {config.placement.gpu_gb:g}: {verdict}")
    return rows
