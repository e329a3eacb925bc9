"""Seconds by stage, on the host's clock: work queued on a GPU shows where the host next waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stages:
    """`with stages("load"): …`"""

    settle: Callable[[], None] | None = None
    """Called at the end of every stage: where a benchmark wants a GPU's work in the stage that queued it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
            if Stages.settle:
                Stages.settle()
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
