"""Work of many small kernels as one launch: a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Made = TypeVar("Made")


def record(run: Callable[[], Made]) -> tuple[torch.cuda.CUDAGraph, Made]:
    """The kernels that `run` launches on the current device, and what it returned, whose tensors each replay writes again.

    It runs once before: kernels compile and libraries make their workspaces outside of a graph. `run` must not wait for the device,
    and what it reads has to stay where it is. Other threads may go on using the device meanwhile.
    """
    current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(current)
    with torch.cuda.stream(aside):
        run()
    current.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        made = run()
    return graph, made
