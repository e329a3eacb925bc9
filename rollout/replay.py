"""The canaries' forward as a CUDA graph: the same sequences come with every sync, and to launch the kernels of a prefill one by one
takes several times as long as to run them.

All of a step but the model's forward stays vLLM's own: it lays out the batch in the buffers that it keeps for that, and the
forward's kernels read them, and the weights, where they always lie. So a graph is good for every batch of the same lengths; what
else it would read is compared, address by address.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from qarl.kernels.graph import Recording

Key = tuple[tuple[str, Any], ...]


class Replay:
    """In the place of a model runner's forward, which it is but for canaries."""

    def __init__(self, runner: Any) -> None:
        self._forward = runner._model_forward
        self._wanted = False
        self._graphs: dict[Key, Recording[Any]] = {}
        self._used: set[Key] = set()
        self.captures = 0
        """Graphs made so far."""
        runner._model_forward = self

    @contextmanager
    def canaries(self) -> Iterator[None]:
        """Forwards in here are replayed where they were run before, and kept until the next time."""
        self._wanted, self._used = True, set()
        try:
            yield
        finally:
            self._wanted = False
            self._graphs = {key: graph for key, graph in self._graphs.items() if key in self._used}

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        if not self._wanted:
            return self._forward(*args, **inputs)
        key = _batch(inputs)
        self._used.add(key)
        if key not in self._graphs:
            self._graphs[key] = Recording(lambda: self._forward(*args, **inputs))
            self.captures += 1
        return self._graphs[key].replay()


def _batch(inputs: dict[str, Any]) -> Key:
    """Every number and every address that the kernels of a forward are launched with, but for those of the weights."""
    from vllm.forward_context import get_forward_context

    context: Any = get_forward_context()  # whose parts could be lists, of micro-batches
    described = {id(one): vars(one) for one in context.attn_metadata.values()}  # layers share one
    mappings = {id(slots): {"slots": slots} for slots in (context.slot_mapping or {}).values()}
    return tuple(
        (name, (value.data_ptr(), tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value)
        for one in (inputs, *described.values(), *mappings.values())
        for name, value in one.items()
    )
