"""The processes of a run as Ray actors: a rank of the learner, an engine; where they are placed, and how their answers are had."""

from __future__ import annotations

import os
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from qarl import formats
from qarl.config import RunConfig
from qarl.records import Standing, WeightUpdate

_PLACES = "qarl"
"""Ray's name for the GPUs of this run, one bundle each."""


class _LearnerActor:
    """One rank of the learner."""

    def rendezvous(self) -> str:
        """Where the ranks meet: this node, a free port."""
        import socket

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

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


class _EngineActor:
    """One engine."""

    def start(self, arguments: dict[str, Any]) -> str:
        """Build the engine; returns its contract hash."""
        from qarl.rollout.engine import open_engine

        self._engine = open_engine(**arguments)
        return self._engine.contract_hash()

    def refill(self, update: Any, canaries: Any) -> Any:
        """`update` is an argument of its own, so that Ray resolves the reference."""
        return self._engine.refill(update, canaries)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._engine, method)(*arguments)


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
    threads = config.learner.threads or max(1, (os.cpu_count() or 1) // config.learner.ranks)
    return ray.remote(_LearnerActor).options(**_resources(config, rank, threads)).remote()


def spawn_engine(config: RunConfig, index: int) -> Any:
    first = config.learner.ranks if config.placement.mode == "split" else 0
    return ray.remote(_EngineActor).options(**_resources(config, first + index, os.cpu_count() or 1)).remote()


def reserve(config: RunConfig) -> None:
    """The GPUs of the run: learner rank i has the i-th; engine j shares it with rank j, or has one behind the ranks'."""
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


def _resources(config: RunConfig, gpu: int, threads: int) -> dict[str, Any]:
    """Ray reserves no CPU: engine and learner take turns on all of them. Colocated, each holds half of a GPU."""
    resources: dict[str, Any] = {"num_cpus": 0, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}}}
    if config.placement.gpus:
        resources["num_gpus"] = 0.5 if config.placement.mode == "colocate" else 1
        resources["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
            ray.util.get_placement_group(_PLACES), placement_group_bundle_index=gpu
        )
    return resources
