"""The processes of a run as Ray actors: a rank of the learner, an engine; where they are placed, and how their answers are had."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from qarl import formats
from qarl.config import RunConfig
from qarl.records import Standing, WeightUpdate

GRACE_S = 10.0
"""For the news that an actor died to arrive, when another already failed for want of it."""
_PLACES = "qarl"
"""Ray's name for the GPUs of this run, one bundle each."""


class _Rank:
    """An actor that meets others."""

    def rendezvous(self) -> str:
        """Where the ranks meet: this node, a free port."""
        import socket

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"


class _LearnerActor(_Rank):
    """One rank of the learner."""

    def start(self, arguments: dict[str, Any]) -> Standing:
        """Build the rank."""
        from qarl.trainer.learner import Learner

        learner = self._learner = Learner(**arguments)
        coverage = formats.coverage(arguments["format"], learner.parameters())
        return Standing(learner.contract_hash(), str(coverage), learner.aligned.describe())

    def publish(self, version: int, n_tiles: int) -> tuple[dict[str, Any] | None, Any]:
        update = self._learner.publish(version, n_tiles)
        return (None, None) if update is None else with_header(update)

    def open_door(self) -> Any:
        return self._learner.open_door(ray.util.get_node_ip_address())

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._learner, method)(*arguments)


class _EngineActor(_Rank):
    """One rank of an engine. All do the same; rank 0 tells of it."""

    def start(self, arguments: dict[str, Any], rank: int, meeting: str) -> str:
        """Build the engine; returns its contract hash."""
        from qarl.rollout.engine import open_engine

        self._engine, self._tells = open_engine(**arguments, rank=rank, meeting=meeting), rank == 0
        return self._engine.contract_hash()

    def refill(self, update: Any, canaries: Any) -> Any:
        """`update` is an argument of its own, so that Ray resolves the reference."""
        return self.call("refill", update, canaries)

    def call(self, method: str, *arguments: Any) -> Any:
        answer = getattr(self._engine, method)(*arguments)
        return answer if self._tells else None


class EngineActors:
    """One engine: an actor for each of its ranks. They are asked together; see `answers`."""

    def __init__(self, config: RunConfig, index: int) -> None:
        n = config.rollout.tensor_parallel
        first = index * n + (config.learner.ranks if config.placement.mode == "split" else 0)
        threads = _threads(n)
        self.ranks: list[Any] = [
            ray.remote(_EngineActor).options(**_resources(config, first + rank, threads)).remote() for rank in range(n)
        ]

    def start(self, arguments: dict[str, Any]) -> list[Any]:
        meeting = self.ranks[0].rendezvous.remote()
        return [actor.start.remote(arguments, rank, meeting) for rank, actor in enumerate(self.ranks)]

    def ask(self, method: str, *arguments: Any) -> list[Any]:
        return [actor.call.remote(method, *arguments) for actor in self.ranks]

    def refill(self, update: Any, canaries: Any) -> list[Any]:
        """`update`: a reference."""
        return [actor.refill.remote(update, canaries) for actor in self.ranks]

    def kill(self) -> None:
        """End the ranks' processes."""
        for actor in self.ranks:
            ray.kill(actor)


def answers(engines: Sequence[EngineActors], asked: Sequence[Sequence[Any]], *errors: type[Exception]) -> list[Any]:
    """What each engine's ranks were asked -> rank 0's answer, or the death of a rank, or one of these errors. Raises any other.

    Where a rank dies the others are ended: they wait for it.
    """
    return [_answer(engine, references, errors) for engine, references in zip(engines, asked, strict=True)]


def _answer(engine: EngineActors, references: Sequence[Any], errors: tuple[type[Exception], ...]) -> Any:
    try:
        return get(list(references))[0]
    except RayActorError as death:
        engine.kill()
        return death
    except Exception as error:
        if len(references) > 1 and (found := first_death(references)):  # a rank may say so before Ray does
            engine.kill()
            return found[1]
        if isinstance(error, errors):
            return error
        raise


def first_death(references: Sequence[Any]) -> tuple[int, RayActorError] | None:
    """The first of these ranks that died, and its death, where another failed for want of it."""
    ray.wait(list(references), num_returns=len(references), timeout=GRACE_S)
    for rank, reference in enumerate(references):
        try:
            ray.get(reference, timeout=0)
        except RayActorError as death:
            return rank, death
        except Exception:
            continue  # a rank that lives: its error is the one being handled, or follows from it
    return None


def with_header(update: WeightUpdate) -> tuple[dict[str, Any], WeightUpdate]:
    """What the loop is told of an update, which it does not fetch."""
    header = {
        "version": update.version,
        "contract_hash": update.contract_hash,
        "n_bytes": update.n_bytes,
        "seconds": dict(update.seconds),
    }
    return header, update


def spawn_learner(config: RunConfig, rank: int) -> Any:
    threads = str(config.learner.threads or _threads(config.learner.ranks))
    return ray.remote(_LearnerActor).options(**_resources(config, rank, threads)).remote()


def reserve(config: RunConfig) -> None:
    """The GPUs of the run: learner rank i has the i-th; so has the i-th rank of all engines', or one behind the learner's."""
    if config.placement.gpus:
        places = ray.util.placement_group([{"GPU": 1}] * config.placement.gpus, strategy="PACK", name=_PLACES)
        ray.get(places.ready())


def get(references: Any) -> Any:
    """`ray.get`, with an actor's own exception as it was raised there."""
    try:
        return ray.get(references)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, Exception):
            raise cause from error
        raise


def _threads(ranks: int) -> str:
    """OMP_NUM_THREADS of each of so many processes that compute at once: the shell's, else an equal share of the cores."""
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // ranks))


def _resources(config: RunConfig, gpu: int, threads: str) -> dict[str, Any]:
    """Ray reserves no CPU: engine and learner take turns on all of them. Colocated, each holds half of a GPU."""
    surroundings = {"OMP_NUM_THREADS": threads}
    if not config.placement.gpus:
        surroundings["CUDA_VISIBLE_DEVICES"] = ""  # or torch would take one that is there
    resources: dict[str, Any] = {"num_cpus": 0, "runtime_env": {"env_vars": surroundings}}
    if config.placement.gpus:
        resources["num_gpus"] = 0.5 if config.placement.mode == "colocate" else 1
        resources["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
            ray.util.get_placement_group(_PLACES), placement_group_bundle_index=gpu
        )
    return resources
