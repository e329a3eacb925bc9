"""How a version gets from the learner to engines: through host memory, or over lines that the two hold to each other.

host        Ray's object store: one update, kept for an engine that is started again. On CPU.
ipc         engine i shares its GPU with learner rank i, and reads that rank's staging buffers in place
broadcast   engines on GPUs of their own: rank 0 gathers, quantizes and broadcasts, by NCCL
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ray.exceptions import RayActorError

from qarl.actors import get
from qarl.errors import LineLost
from qarl.records import Published, RefillReport, SyncRequest

Answer = RefillReport | RayActorError | LineLost


class Bridge(Protocol):
    def connect(self, engines: Sequence[Any]) -> list[Any]:
        """These actors are the engines from now on; `None` of each, or its death. Raises what a rank raises."""

    def deliver(self, engines: Sequence[Any], request: SyncRequest) -> tuple[Published, list[Answer]]:
        """Bring every engine to the learner's weights as they are, as that version; asked again, for the same request, where an
        engine is missing. An engine that died has its death in the place of its report. Raises what an engine or a rank raises."""


@dataclass
class ThroughHost:
    """See above."""

    publish: Callable[[SyncRequest], tuple[Published, Any]]
    """What is published, and Ray's reference to the `WeightUpdate`."""
    _kept: tuple[SyncRequest, tuple[Published, Any]] | None = None

    def connect(self, engines: Sequence[Any]) -> list[Any]:
        return [None] * len(engines)

    def deliver(self, engines: Sequence[Any], request: SyncRequest) -> tuple[Published, list[Answer]]:
        if self._kept is None or self._kept[0] is not request:
            self._kept = request, self.publish(request)
        _, (published, update) = self._kept
        return published, answers([engine.refill.remote(update, request.sequences) for engine in engines])


class OverLines:
    """See above."""

    def __init__(self, carrier: str, learner: Any) -> None:
        """`learner`: a `cluster.LearnerGroup`."""
        self._carrier, self._learner = carrier, learner

    def connect(self, engines: Sequence[Any]) -> list[Any]:
        shares = [[engine] for engine in engines] if self._carrier == "ipc" else [list(engines)]
        return self._learner.hold_lines(self._carrier, shares)

    def deliver(self, engines: Sequence[Any], request: SyncRequest) -> tuple[Published, list[Answer]]:
        publishing = self._learner.publish_to_lines(request)
        reading = [engine.call.remote("refill_from_line", request.sequences) for engine in engines]
        published, found = publishing(), answers(reading, LineLost)
        if not any(isinstance(answer, RayActorError) for answer in found):
            for answer in found:
                if isinstance(answer, LineLost):  # by no engine's death
                    raise answer
        return published, found  # lines that were cut because of a death are held again before they are asked again


def answers(references: Sequence[Any], *errors: type[Exception]) -> list[Any]:
    """Each actor's answer, or its death, or one of these errors. Raises any other."""
    found: list[Any] = []
    wanted: tuple[type[Exception], ...] = (RayActorError, *errors)
    for reference in references:
        try:
            found.append(get(reference))
        except wanted as error:
            found.append(error)
    return found
