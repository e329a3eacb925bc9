"""The transformers model as the torch engine holds it: published codes where a format quantizes, plain tensors elsewhere.

There are no masters here. A quantized weight exists only as what a backend's `prepare` makes of its codes, sliced by output
feature, since transformers keeps apart (q, k, v; gate, up) what is published in one piece.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from qarl.formats import QuantFormat, Shape
from qarl.fusion import covered_shapes, engine_name, fuse
from qarl.kernels.dispatch import load
from qarl.kernels.router import routed
from qarl.kernels.routing import collect, route, row_weights, spread
from qarl.wire import Specs, published_specs


class Skeleton:
    """A model whose weights come from a `WeightUpdate`."""

    def __init__(self, path: str | Path, dtype: torch.dtype, format: QuantFormat, revision: str | None = None) -> None:
        self.format, self.dtype = format, dtype
        config = AutoConfig.from_pretrained(path, revision=revision)
        with init_empty_weights(include_buffers=False):  # rotary frequencies are buffers, made here and not published
            self.model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
        self.model.tie_weights()  # made empty one by one, tied ones came apart
        self._shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}  # tied ones once
        for name, shape in self._shapes.items():
            format.check_shape(name, shape)
        self._fused = fuse(self._shapes)
        self._layers: dict[str, CodeLinear | CodeExperts] = {}
        self._replace_covered()

    @cached_property
    def covered(self) -> dict[str, Shape]:
        """Fused name -> shape of what the format quantizes."""
        return covered_shapes(self._shapes, self.format)

    @cached_property
    def expected(self) -> Specs:
        """What the model wants of each fused tensor."""
        return published_specs(self._shapes, self.format, self.dtype)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Hold these tensors (as `expected`) from now on, as copies."""
        for fused, parts in tensors.items():
            row = 0
            for name in self._fused[fused]:
                shape = self._shapes[name]
                axis = -2 if len(shape) > 1 else 0
                rows = {part: tensor.narrow(axis, row, shape[axis]).clone() for part, tensor in parts.items()}
                row += shape[axis]
                if name in self._layers:
                    self._layers[name].hold(name, rows)
                else:
                    (values,) = rows.values()
                    _assign(self.model, name, values.to(self.dtype))
        self.model.tie_weights()

    @torch.no_grad()
    def served_columns(self, fused: str, columns: Tensor) -> Tensor:
        """float32 [..., N, C]: the columns of a covered weight, by sending one-hot inputs through its layers."""
        one_hot = torch.zeros(len(columns), self.covered[fused][-1], dtype=self.dtype)
        one_hot[torch.arange(len(columns)), columns] = 1
        return torch.cat([self._layers[name].columns(name, one_hot) for name in self._fused[fused]], dim=-2)

    def _replace_covered(self) -> None:
        for name, shape in self._shapes.items():
            if not self.format.covers(name, shape):
                continue
            path = name.removesuffix(".weight") if len(shape) == 2 else name.rpartition(".")[0]
            module = self.model.get_submodule(path)
            if not isinstance(module, CodeLinear | CodeExperts):
                module = (CodeLinear if len(shape) == 2 else CodeExperts)(module, self.format, self.dtype)
                self.model.set_submodule(path, module)
            self._layers[name] = module
        if self._layers:
            for module in self.model.modules():
                if isinstance(module, Qwen3MoeTopKRouter):
                    module.forward = partial(_choose, module)  # type: ignore[method-assign]


def _choose(router: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As an aligned learner's."""
    return routed(hidden, router.weight, router.top_k, router.norm_topk_prob)


class CodeLinear(nn.Module):
    """A linear layer that holds codes. Its bias, where there is one, is a plain tensor."""

    def __init__(self, linear: nn.Module, format: QuantFormat, dtype: torch.dtype) -> None:
        super().__init__()
        self.kernel, self.group, self.dtype = load(format.name, "emulated"), format.group, dtype
        self.bias: Any = linear.bias
        self.prepared: Any = None

    def hold(self, name: str, codes: Mapping[str, Tensor]) -> None:
        self.prepared = self.kernel.prepare(dict(codes), self.group, self.dtype)

    def columns(self, name: str, one_hot: Tensor) -> Tensor:
        return self.kernel.product(one_hot, self.prepared, None).T.float()

    def forward(self, x: Tensor) -> Tensor:
        y = self.kernel.product(x.reshape(-1, x.shape[-1]), self.prepared, self.bias)
        return y.reshape(*x.shape[:-1], -1)


class CodeExperts(nn.Module):
    """Packed experts (transformers 5) that hold codes, expert by expert."""

    def __init__(self, experts: Any, format: QuantFormat, dtype: torch.dtype) -> None:
        super().__init__()
        self.kernel, self.group, self.dtype = load(format.name, "emulated"), format.group, dtype
        self.act_fn = experts.act_fn
        self.prepared: dict[str, Any] = {}
        """`w13` and `w2`: of all experts."""

    def hold(self, name: str, codes: Mapping[str, Tensor]) -> None:
        self.n_experts = len(next(iter(codes.values())))
        self.prepared[_leaf(name)] = self.kernel.prepare(dict(codes), self.group, self.dtype)

    def columns(self, name: str, one_hot: Tensor) -> Tensor:
        offsets = torch.arange(1, self.n_experts + 1) * len(one_hot)
        y = self.kernel.grouped_product(one_hot.repeat(self.n_experts, 1), self.prepared[_leaf(name)], offsets)
        return y.unflatten(0, (self.n_experts, -1)).mT.float()

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden [T, H], top_k_index and top_k_weights [T, k] -> [T, H]."""
        to = route(top_k_index, self.n_experts)
        rows = self.kernel.grouped_product(spread(hidden, to), self.prepared["w13"], to.offsets)
        gate, up = rows.chunk(2, dim=-1)
        weights = row_weights(top_k_weights, to)
        return collect(
            self.kernel.grouped_product(self.act_fn(gate) * up, self.prepared["w2"], to.offsets, weights), to
        )


def _leaf(parameter: str) -> str:
    return engine_name(parameter)[0].rpartition(".")[2]


def _assign(model: nn.Module, name: str, values: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(values, requires_grad=False))
