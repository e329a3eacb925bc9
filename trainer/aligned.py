"""Align a model: every parameter the format covers computes as the sampler does, forward; straight through, backward.

Modules stay what they are and only their `forward` changes, so that names do not change and DeepSpeed's hooks still gather
and release weights: under ZeRO-3 a weight exists only inside its module's forward and backward.
"""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts, Qwen3MoeTopKRouter

from qarl.errors import ConfigError
from qarl.formats import QuantFormat
from qarl.fusion import is_summed
from qarl.kernels.activation import silu_and_multiply
from qarl.kernels.dispatch import Codes, choose, has_engine
from qarl.kernels.linear import Arithmetic, Prepared, aligned_expert_shards, aligned_linear, plain_arithmetic
from qarl.kernels.routing import collect, route, row_weights, spread
from qarl.trainer.chain import Router, follow_engine, unknown


class AlignedModel:
    """The aligned forward of one model: what is covered, and the weights laid out for its products as they are now."""

    def __init__(
        self,
        model: nn.Module,
        format: QuantFormat,
        backend: str,
        device_type: str,
        dtype: torch.dtype,
        ranks: int = 1,
    ) -> None:
        """Swaps forwards in place. Backend `none` aligns nothing: the learner computes unquantized, by transformers' own ops (but
        for experts in bfloat16 on a GPU, which `PlainExperts` sums faster).

        By `auto` a 16-bit model that nothing quantizes follows the engine too, where it is known how: in all but the products,
        though their parts are summed as the engine's. `ranks`: of the engine.
        """
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self.covered = {name: shape for name, shape in shapes.items() if format.covers(name, shape)}
        for name, shape in self.covered.items():
            format.check_shape(name, shape)
        self._has_experts = any(len(shape) == 3 for shape in shapes.values())
        self._prepared: dict[str, Prepared] = {}
        self._stale: set[str] = set()
        self._format, self.backend, self.follows_engine, self._ranks = format, "none", False, ranks
        self._dtype = dtype
        if self.covered and backend != "none":
            self.backend = choose(format.name, backend, device_type, dtype)
            self._arithmetic = Arithmetic(format.name, format.group, self.backend, dtype)
            self._swap(model)
        self.follows_engine = self._follows(model, backend, device_type, dtype)
        if self.backend == "none":  # nothing is quantized
            shards = ranks if self.follows_engine else 1
            sum_plain_shards(model, shards)
            if device_type == "cuda" and dtype == torch.bfloat16:
                move_plain_experts(model, shards)
        if self.follows_engine:
            assert isinstance(model, PreTrainedModel)
            follow_engine(model, device_type)

    def describe(self) -> str:
        """How the learner computes, in a few words for the start of a run."""
        others = f"other ops {'engine' if self.follows_engine else 'torch'}"
        if not self.covered:
            return f"nothing is quantized, {others}"
        if self.backend == "none":
            return "not aligned (learner.backend is none)"
        how = " (dequantized as Marlin does)" if self._format.weight == "int4" else ""
        summed = f" (summed over {self._ranks} ranks)" if self._ranks > 1 else ""
        return f"products {self.backend}{how}{summed}, {others}"

    @property
    def waits_for_host(self) -> bool:
        """Whether a forward on a GPU may read back where each expert's rows end, which no CUDA graph can: the definitions do, and
        torch's grouped product but in bfloat16 on compute capability 9 and 10."""
        grouped = self._dtype == torch.bfloat16 and torch.cuda.get_device_capability()[0] in (9, 10)
        return self.backend == "emulated" or (self._has_experts and not grouped)

    def _follows(self, model: nn.Module, asked: str, device_type: str, dtype: torch.dtype) -> bool:
        """Whether the engine's ops are wanted between products, and here."""
        if asked != "auto" or self.backend == "engine":
            return self.backend == "engine"
        if self.covered:  # `fused` computes the engine's products where the engine's own are too slow
            may = self.backend == "fused"
        elif dtype == torch.float32:  # a last bit is 1e-7 and decides no code: 3e-6 nats a token either way
            may = False
        else:
            may = isinstance(model, PreTrainedModel) and unknown(model.config, device_type) is None
        return may and has_engine(device_type, dtype)

    def invalidate(self) -> None:
        """The weights have changed: all codes are made anew when they are next asked for."""
        self._stale = set(self._prepared)

    def _swap(self, model: nn.Module) -> None:
        left = set(self.covered)
        module: Any  # whose forward is replaced
        for path, module in model.named_modules():
            own = {f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)} & left
            is_linear, is_router = isinstance(module, nn.Linear), isinstance(module, Qwen3MoeTopKRouter)
            if own == {f"{path}.weight"} and is_linear:
                module.forward = _Linear(self, module, f"{path}.weight")
            elif own == {f"{path}.gate_up_proj", f"{path}.down_proj"}:
                module.forward = _Experts(self, module, path)
            else:
                if is_router:
                    module.forward = Router(module)
                continue
            left -= own
        if left:  # an architecture whose layers compute in a way not known here
            raise ConfigError(f"rollout.format: there is no aligned forward for {sorted(left)[:3]}; choices: 'bf16'")

    def _of(self, name: str, weight: Tensor) -> Prepared | None:
        """Prepared once per version of the weight, also where gradient checkpointing runs a forward twice.

        `None` for a weight that ZeRO-3 shards: all codes together are a whole model, on every rank.
        """
        if hasattr(weight, "ds_id"):
            return None
        if name not in self._prepared or name in self._stale:
            self._prepared[name] = self._of_layer(name).prepare(weight.detach(), self._prepared.get(name))
            self._stale.discard(name)
        return self._prepared[name]

    def _of_layer(self, name: str) -> Arithmetic:
        return replace(self._arithmetic, shards=self._ranks if is_summed(name) else 1)

    def codes(self, name: str, weight: Tensor) -> Codes | None:
        """Of a covered weight as it is now, where they are kept."""
        prepared = self._of(name, weight) if self.backend != "none" else None
        return prepared.codes if prepared else None

    def prepared(self) -> list[Prepared]:
        """All that is kept."""
        return list(self._prepared.values())

    def linear(self, x: Tensor, name: str, weight: Tensor, bias: Tensor | None) -> Tensor:
        return aligned_linear(x, weight, bias, self._of_layer(name), self._of(name, weight))

    def experts(
        self, x: Tensor, name: str, weight: Tensor, offsets: Tensor, row_weights: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """One product, or those of the engine's ranks, which each sum over experts before they sum each other's."""
        return aligned_expert_shards(x, weight, offsets, self._of_layer(name), self._of(name, weight), row_weights)


def move_plain_experts(model: nn.Module, ranks: int = 1) -> None:
    """Packed experts that nothing quantizes: transformers' arithmetic, but rows move our way, in half the time.

    Of one class alone: others have parameters of these names too, but clamp their gates or lie transposed.
    """
    module: Any  # whose forward is replaced
    for path, module in model.named_modules():
        is_known = isinstance(module, Qwen3MoeExperts)
        if is_known:
            module.forward = _Experts(PlainExperts(ranks), module, path)


class PlainExperts:
    """The products of experts where nothing is quantized."""

    def __init__(self, ranks: int = 1) -> None:
        self._ranks = ranks

    def experts(
        self, x: Tensor, name: str, weight: Tensor, offsets: Tensor, row_weights: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        arithmetic = plain_arithmetic(x.dtype, self._ranks if is_summed(name) else 1)
        return aligned_expert_shards(x, weight, offsets, arithmetic, None, row_weights)


def sum_plain_shards(model: nn.Module, ranks: int) -> None:
    """Linear layers that nothing quantizes and that the engine's ranks cut along their inputs: summed as the ranks do."""
    module: Any  # whose forward is replaced
    for path, module in model.named_modules():
        is_linear = isinstance(module, nn.Linear)
        if ranks > 1 and is_linear and is_summed(path):
            module.forward = _SummedLinear(module, ranks)


class _SummedLinear:
    """Forward of one `nn.Linear` whose product is the sum of equal shares of the inputs, each rounded."""

    def __init__(self, module: nn.Linear, ranks: int) -> None:
        self.module, self.ranks = module, ranks

    def __call__(self, x: Tensor) -> Tensor:
        shares = zip(x.chunk(self.ranks, -1), self.module.weight.chunk(self.ranks, -1), strict=True)
        first, *others = ((share, weight) for share, weight in shares)
        return sum((F.linear(*share) for share in others), F.linear(*first, self.module.bias))


class _Linear:
    """Forward of one `nn.Linear`."""

    def __init__(self, aligned: AlignedModel, module: nn.Linear, name: str) -> None:
        self.aligned, self.module, self.name = aligned, module, name

    @torch.compiler.disable
    def __call__(self, x: Tensor) -> Tensor:
        return self.aligned.linear(x, self.name, self.module.weight, self.module.bias)


class _Experts:
    """Forward of one module of packed experts: `gate_up_proj` [E, 2M, H], `down_proj` [E, H, M], as in transformers 5."""

    def __init__(self, aligned: AlignedModel | PlainExperts, module: Any, path: str) -> None:
        self.aligned, self.module, self.path = aligned, module, path

    @torch.compiler.disable
    def __call__(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden [T, H], experts chosen for each token and their weights [T, top_k] -> [T, H]."""
        module, aligned = self.module, self.aligned
        to = route(top_k_index, module.num_experts)
        (gate_up,) = aligned.experts(spread(hidden, to), f"{self.path}.gate_up_proj", module.gate_up_proj, to.offsets)
        weights = row_weights(top_k_weights, to)
        if isinstance(module.act_fn, nn.SiLU | SiLUActivation):
            inner = silu_and_multiply(gate_up)
        else:
            gate, up = gate_up.chunk(2, dim=-1)
            inner = module.act_fn(gate) * up
        shards = aligned.experts(inner, f"{self.path}.down_proj", module.down_proj, to.offsets, weights)
        return reduce(torch.add, [collect(down, to) for down in shards])
