"""The ranks of one engine: processes with a GPU each that hold a part of every layer (tensor parallelism).

Each rank starts vLLM as if it were alone (vLLM calls this an external launcher), with a scheduler of its own. All are given the
same requests in the same order, so they take the same steps and meet in the sums between layers, and no worker has to be called
from another process: a refill runs in a rank as it does in an engine of one. What fails on one rank has to fail on all, since
those that went on would wait for it for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from qarl.errors import EngineError, LineLost, SyncError

if TYPE_CHECKING:
    from vllm.v1.executor import Executor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of its engine; alone, where nothing else is said."""

    index: int = 0
    count: int = 1
    meeting: str = ""
    """Where they meet, as torch understands it: tcp://host:port. Not asked for where there is one."""

    def settings(self) -> dict[str, Any]:
        """Of vLLM. Parts are summed by NCCL: two of them once, each sum rounded once, whatever the batch."""
        if self.count == 1:
            return {}
        return {
            "tensor_parallel_size": self.count,
            "distributed_executor_backend": _executor(self.meeting, self.index),
            "disable_custom_all_reduce": True,
        }

    def gather(self, mine: T) -> list[T]:
        """Every rank's, which all have to ask for. Raises `EngineError` where one is gone."""
        if self.count == 1:
            return [mine]
        from vllm.distributed.parallel_state import get_world_group

        found: list[Any] = [None] * self.count
        try:
            dist.all_gather_object(found, mine, group=get_world_group().cpu_group)
        except RuntimeError as gone:
            raise EngineError(f"rank {self.index} of the engine lost another rank: {gone}") from gone
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is raised inside on one rank is raised on all: a rank's own error, or `SyncError` with another's, which may be why
        its own line was lost."""
        error: Exception | None = None
        try:
            yield
        except Exception as own:
            error = own
        told = self.gather(None if error is None else (isinstance(error, LineLost), str(error)))
        others = [(rank, *found) for rank, found in enumerate(told) if found is not None and rank != self.index]
        if error is not None and (not isinstance(error, LineLost) or all(is_lost for _, is_lost, _ in others)):
            raise error
        for rank, is_lost, why in sorted(others, key=lambda other: other[1]):
            raise (LineLost if is_lost else SyncError)(f"rank {rank} of the engine: {why}") from error


ALONE = Ranks()
"""An engine of one."""


def _executor(meeting: str, index: int) -> type[Executor]:
    """vLLM's executor for ranks that were started by others, told of them by arguments in place of the environment."""
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    class OneRank(ExecutorWithExternalLauncher):
        def _distributed_args(self) -> tuple[str, int, int]:
            return meeting, index, 0  # each rank sees one device

    return OneRank
