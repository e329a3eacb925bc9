"""How a version gets from the learner to engines: through host memory, or over lines that the two hold to each other.

host        Ray's object store: one update, kept for an engine that is started again. On CPU.
ipc         the i-th GPU of the engines is learner rank i's, whose staging buffers it reads in place
broadcast   engines on GPUs of their own: rank 0 gathers, quantizes and broadcasts, by NCCL

Every rank of an engine has a line of its own, gets all of a version, and takes its share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ray.exceptions import RayActorError

from qarl.actors import EngineActors, answers
from qarl.errors import LineLost
from qarl.records import Published, RefillReport, SyncRequest

Answer = RefillReport | RayActorError | LineLost


class Bridge(Protocol):
    def connect(self, engines: Sequence[EngineActors]) -> list[Any]:
        """These are the engines from now on; `None` of each, or its death. Raises what a rank raises."""

    def deliver(self, engines: Sequence[EngineActors], request: SyncRequest) -> tuple[Published, list[Answer]]:
        """Bring every engine to the learner's weights as they are, as that version; asked again, for the same request, where an
        engine is missing. An engine that died has its death in the place of its report. Raises what an engine or a rank raises."""


@dataclass
class ThroughHost:
    """See above."""

    publish: Callable[[SyncRequest], tuple[Published, Any]]
    """What is published, and Ray's reference to the `WeightUpdate`."""
    _kept: tuple[SyncRequest, tuple[Published, Any]] | None = None

    def connect(self, engines: Sequence[EngineActors]) -> list[Any]:
        return [None] * len(engines)

    def deliver(self, engines: Sequence[EngineActors], request: SyncRequest) -> tuple[Published, list[Answer]]:
        if self._kept is None or self._kept[0] is not request:
            self._kept = request, self.publish(request)
        _, (published, update) = self._kept
        return published, answers(engines, [engine.refill(update, request.sequences) for engine in engines])


class OverLines:
    """See above."""

    def __init__(self, carrier: str, learner: Any) -> None:
        """`learner`: a `cluster.LearnerGroup`."""
        self._carrier, self._learner = carrier, learner

    def connect(self, engines: Sequence[EngineActors]) -> list[Any]:
        return self._learner.hold_lines(self._carrier, engines)

    def deliver(self, engines: Sequence[EngineActors], request: SyncRequest) -> tuple[Published, list[Answer]]:
        publishing = self._learner.publish_to_lines(request)
        reading = [engine.ask("refill_from_line", request.sequences) for engine in engines]
        published, found = publishing(), answers(engines, reading, LineLost)
        if not any(isinstance(answer, RayActorError) for answer in found):
            for answer in found:
                if isinstance(answer, LineLost):  # by no engine's death
                    raise answer
        return published, found  # lines that were cut because of a death are held again before they are asked again
