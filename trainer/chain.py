"""Everything between the quantized products as the engine computes it: attention, rotary embedding and, on CUDA, norms and routers.

Exact products are not enough: a last bit in one of these moves an activation to another code, and codes that differ cascade over
layers until the learner is as far from the engine as an unaligned one. On CPU vLLM norms as transformers does; silu(gate) * up is
computed alike on both devices, and so are a router's logits.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from qarl.errors import ConfigError
from qarl.kernels.attention import CPU_HEADS
from qarl.kernels.norm import fused_rms_norm
from qarl.kernels.rotary import ROPE_TYPES, engine_rotary, rotary_table
from qarl.kernels.router import engine_top_experts, routed, top_experts
from qarl.trainer.attention import PACKED_ENGINE

ARCHITECTURES = ("llama", "qwen3", "qwen3_moe")
"""`model_type` of the models whose every op between products is known here. SmolLM2 is a llama."""
_NORMS = ("input_layernorm", "post_attention_layernorm", "norm", "q_norm", "k_norm")


def follow_engine(model: PreTrainedModel, device_type: str) -> None:
    """Swaps forwards in place. Raises `ConfigError` where it is not known how the engine computes this model."""
    config: Any = model.config
    if why := unknown(config, device_type):
        _refuse(why)
    _rotate_as_the_engine(model, config.num_hidden_layers)
    if device_type == "cuda":
        _norm_as_the_engine(model)
        _tabulate_as_the_engine(model)
        _route_as_the_engine(model)
    model.set_attn_implementation(PACKED_ENGINE)


def unknown(config: Any, device_type: str) -> str | None:
    """Why a model of this configuration cannot follow the engine on that device; `None` where it can."""
    if config.model_type not in ARCHITECTURES:
        return f"the engine's forward of {config.model_type!r} is not known (known: {', '.join(ARCHITECTURES)})"
    size, parameters = _head_size(config), config.rope_parameters
    if device_type != "cuda":
        takes = ", ".join(map(str, CPU_HEADS))
        return None if size in CPU_HEADS else f"its attention takes heads of {takes} on a CPU, not of {size}"
    if 64 < size <= 96:
        return f"its attention sums heads of {size} in another order over its cache than over a whole sequence"
    rope = parameters.get("rope_type", "default")
    if rope not in ROPE_TYPES or parameters.get("partial_rotary_factor", 1.0) != 1.0:
        return f"its table of rotary type {rope!r} is not known (known: {', '.join(ROPE_TYPES)}, of whole heads)"
    return None


def _refuse(why: str) -> None:
    raise ConfigError(f"learner.backend: engine: {why}; choices: 'emulated', 'none' and, on a GPU, 'fused'")


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rotate_as_the_engine(model: nn.Module, n_layers: int) -> None:
    """Gives each attention module a forward that finds the engine's rotary embedding under the name transformers calls.

    The forward is the module's own code over its own globals, but for that one name: no other model is touched.
    """
    name = "apply_rotary_pos_emb"
    n_found = 0
    for module in model.modules():
        forward: Any = type(module).forward
        if name in getattr(getattr(forward, "__code__", None), "co_names", ()):
            names = {**forward.__globals__, name: engine_rotary}
            own = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
            own.__kwdefaults__ = forward.__kwdefaults__
            module.forward = MethodType(own, module)
            n_found += 1
    # A forward behind a decorator would hide the name, and the learner would drift off without a word.
    if n_found != n_layers:
        _refuse(f"{n_found} of {n_layers} attention layers call transformers' {name} by that name")


def _norm_as_the_engine(model: nn.Module) -> None:
    module: Any  # whose forward is replaced
    for path, module in model.named_modules():
        if not type(module).__name__.endswith("RMSNorm"):
            continue
        if path.rpartition(".")[2] not in _NORMS:
            _refuse(f"what the engine makes of the norm {path!r} is not known")
        module.forward = _Norm(module)


def _tabulate_as_the_engine(model: nn.Module) -> None:
    module: Any  # whose forward is replaced
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.forward = _Angles(module.config)


def _route_as_the_engine(model: nn.Module) -> None:
    module: Any  # whose forward is replaced
    for module in model.modules():
        is_router = isinstance(module, Qwen3MoeTopKRouter)
        if is_router:
            module.forward = Router(module, engine_top_experts)


class Router:
    """Forward of one router: as transformers computes it, but its weights stay float32, as in vLLM."""

    def __init__(self, module: Qwen3MoeTopKRouter, choose: Callable[..., tuple[Tensor, Tensor]] = top_experts) -> None:
        self.module, self.choose = module, choose

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [*, H] -> logits [T, E], weights float32 and experts [T, top_k]."""
        module = self.module
        return routed(hidden, module.weight, module.top_k, module.norm_topk_prob, self.choose)


class _Norm:
    """Forward of one norm. Learner and engine add the residual alike, so the norm of the sum is all that is left."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self, hidden_states: Tensor) -> Tensor:
        return fused_rms_norm(hidden_states, self.module.weight, self.module.variance_epsilon)


class _Angles:
    """Forward of the module that gives transformers cos and sin: they are read from a table, made when a device is known."""

    def __init__(self, config: Any) -> None:
        self.width, self.n_positions = _head_size(config), config.max_position_embeddings
        self.parameters = config.rope_parameters
        self.table: Tensor | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids [1, T] -> cos and sin [1, T, D], both halves equal, in x's dtype."""
        if self.table is None or self.table.device != x.device or self.table.dtype != x.dtype:
            self.table = rotary_table(self.width, self.n_positions, self.parameters, x.dtype, x.device)
        cos, sin = self.table[position_ids].chunk(2, dim=-1)
        return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)
