"""Align a model: every parameter the format covers computes as the sampler does, forward; straight through, backward.

Modules stay what they are and only their `forward` changes, so that names do not change and DeepSpeed's hooks still gather
and release weights: under ZeRO-3 a weight exists only inside its module's forward and backward.
"""

from __future__ import annotations

from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qarl.errors import ConfigError
from qarl.formats import QuantFormat
from qarl.kernels.dispatch import choose
from qarl.kernels.linear import Arithmetic, Prepared, aligned_experts, aligned_linear
from qarl.kernels.rotary import engine_rotary
from qarl.kernels.routing import collect, route, row_weights, spread
from qarl.trainer.attention import PACKED_ENGINE


class AlignedModel:
    """The aligned forward of one model: what is covered, and the weights laid out for its products as they are now."""

    def __init__(
        self, model: nn.Module, format: QuantFormat, backend: str, device_type: str, dtype: torch.dtype
    ) -> None:
        """Swaps forwards in place. Backend `none` swaps nothing: the learner computes unquantized, and is not aligned."""
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        self.covered = {name: shape for name, shape in shapes.items() if format.covers(name, shape)}
        for name, shape in self.covered.items():
            format.check_shape(name, shape)
        self._prepared: dict[str, Prepared] = {}
        self.backend = "none"
        if self.covered and backend != "none":
            self.backend = choose(format.name, backend, device_type, dtype)
            self._arithmetic = Arithmetic(format.name, format.group, self.backend, dtype)
            self._swap(model)
            if self.backend == "engine":
                assert isinstance(model, PreTrainedModel)
                model.set_attn_implementation(PACKED_ENGINE)
                _rotate_as_the_engine(model)

    def invalidate(self) -> None:
        """Forget all codes: the weights have changed."""
        self._prepared.clear()

    def _swap(self, model: nn.Module) -> None:
        left = set(self.covered)
        module: Any  # whose forward is replaced
        for path, module in model.named_modules():
            own = {f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)} & left
            is_linear = isinstance(module, nn.Linear)
            if own == {f"{path}.weight"} and is_linear:
                module.forward = _Linear(self, module, f"{path}.weight")
            elif own == {f"{path}.gate_up_proj", f"{path}.down_proj"}:
                module.forward = _Experts(self, module, path)
            else:
                continue
            left -= own
        if left:  # an architecture whose layers compute in a way not known here
            raise ConfigError(f"rollout.format: there is no aligned forward for {sorted(left)[:3]}; choices: 'bf16'")

    def _of(self, name: str, weight: Tensor) -> Prepared | None:
        """Prepared once per version of the weight, also where gradient checkpointing runs a forward twice.

        What is made of a weight that ZeRO-3 shards is not kept: all of it together is a whole model on every rank.
        """
        if hasattr(weight, "ds_id"):
            return None
        if name not in self._prepared:
            self._prepared[name] = self._arithmetic.prepare(weight.detach())
        return self._prepared[name]

    def linear(self, x: Tensor, name: str, weight: Tensor, bias: Tensor | None) -> Tensor:
        return aligned_linear(x, weight, bias, self._arithmetic, self._of(name, weight))

    def experts(
        self, x: Tensor, name: str, weight: Tensor, offsets: Tensor, row_weights: Tensor | None = None
    ) -> Tensor:
        return aligned_experts(x, weight, offsets, self._arithmetic, self._of(name, weight), row_weights)


class _Linear:
    """Forward of one `nn.Linear`."""

    def __init__(self, aligned: AlignedModel, module: nn.Linear, name: str) -> None:
        self.aligned, self.module, self.name = aligned, module, name

    def __call__(self, x: Tensor) -> Tensor:
        return self.aligned.linear(x, self.name, self.module.weight, self.module.bias)


class _Experts:
    """Forward of one module of packed experts: `gate_up_proj` [E, 2M, H], `down_proj` [E, H, M], as in transformers 5."""

    def __init__(self, aligned: AlignedModel, module: Any, path: str) -> None:
        self.aligned, self.module, self.path = aligned, module, path

    def __call__(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden [T, H], experts chosen for each token and their weights [T, top_k] -> [T, H]."""
        module, aligned = self.module, self.aligned
        to = route(top_k_index, module.num_experts)
        gate_up = aligned.experts(spread(hidden, to), f"{self.path}.gate_up_proj", module.gate_up_proj, to.offsets)
        gate, up = gate_up.chunk(2, dim=-1)
        weights = row_weights(top_k_weights, to)
        inner = module.act_fn(gate) * up
        down = aligned.experts(inner, f"{self.path}.down_proj", module.down_proj, to.offsets, weights)
        return collect(down, to)


def _rotate_as_the_engine(model: nn.Module) -> None:
    """Gives each attention module a forward that finds the engine's rotary embedding under the name transformers calls.

    The forward is the module's own code over its own globals, but for that one name: no other model is touched.
    """
    name = "apply_rotary_pos_emb"
    for module in model.modules():
        forward: Any = type(module).forward
        if name in getattr(getattr(forward, "__code__", None), "co_names", ()):
            names = {**forward.__globals__, name: engine_rotary}
            own = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
            own.__kwdefaults__ = forward.__kwdefaults__
            module.forward = MethodType(own, module)
