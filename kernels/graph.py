"""Work of many small kernels as one launch: a CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

Made = TypeVar("Made")


class Recording(Generic[Made]):
    """The kernels that a function launches on the current device, to be launched again as often as one likes.

    The function runs once before: kernels compile and libraries make their workspaces outside of a graph. It must not wait for the
    device, and what it reads has to stay where it is: tensors that it alone knows live as long as the recording does. Other threads
    may go on using the device meanwhile.
    """

    def __init__(self, run: Callable[[], Made]) -> None:
        self._run = (
            run  # kept for what its closure holds: freed, those addresses would be others' when the kernels read them
        )
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            run()
        current.wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with _without_collector(), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._made = run()

    def replay(self) -> Made:
        """What the function returned, its tensors written again: those of every replay are the same ones."""
        self._graph.replay()
        return self._made


@contextmanager
def _without_collector() -> Iterator[None]:
    """Were another graph among the garbage of cycles, freeing it here would break the capture under way."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
