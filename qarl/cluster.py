"""Processes: the learner's ranks and the engines as Ray actors, and the handles the loop speaks to.

| worker  | consumes                         | produces               | waits for        |
|---------|----------------------------------|------------------------|------------------|
| learner | micro-batches, from the loop     | log-probs, statistics, | its fellow ranks |
|         |                                  | `WeightUpdate`         |                  |
| engine  | `WeightUpdate`, prompts, seeds   | completions            | nobody           |

The loop calls them in turn, so colocated workers never compute at the same time. The loop holds references to a
`WeightUpdate`, never its bytes. An engine that dies is started again, refilled to the current version, and asked again; a
learner that dies ends the run, which `resume=auto` continues. `Cluster.open` owns start and stop of everything.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError

from qarl import formats
from qarl.config import RunConfig
from qarl.errors import EngineError, LearnerError
from qarl.records import Completion, MiniBatch, Prompt, RefillReport, Sampling, UpdateStats, WeightUpdate

GRACE_S = 10.0
"""For the news that an actor died to arrive, when another already failed for want of it."""


@dataclass(frozen=True)
class Published:
    """What the loop knows of a `WeightUpdate`; the update itself stays with Ray."""

    version: int
    contract_hash: str
    n_bytes: int
    seconds: dict[str, float]
    update: Any
    """Reference to the `WeightUpdate`."""


@dataclass(frozen=True)
class Standing:
    """What a learner says of itself once it stands."""

    contract_hash: str
    coverage: str
    arithmetic: str
    """How it computes: the backend of its products, where `auto` was asked for, and whose the other ops are."""


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
        return (None, None) if update is None else _with_header(update)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._learner, method)(*arguments)


class _EngineActor:
    """One engine."""

    def start(self, arguments: dict[str, Any]) -> str:
        """Build the engine; returns its contract hash."""
        from qarl.rollout.engine import open_engine

        self._engine = open_engine(**arguments)
        return self._engine.contract_hash()

    def refill(self, update: Any) -> RefillReport:
        return self._engine.refill(update)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._engine, method)(*arguments)


class LearnerGroup:
    """All ranks of the learner as one policy that can be scored, stepped and published."""

    def __init__(self, config: RunConfig, model: str) -> None:
        self.ranks = config.learner.ranks
        self.tokens = config.learner.tokens
        """Of a micro-batch, at most."""
        self._ranks = [_spawn_learner(config) for _ in range(self.ranks)]
        meeting = self._all([self._ranks[0].rendezvous.remote()])[0]
        arguments = {
            "config": config.learner,
            "model_path": model,
            "dtype": config.model.dtype,
            "format": formats.get(config.rollout.format),
            "objective": config.algorithm.objective,
            "temperature": config.rollout.sampling.temperature,
            "total_updates": config.steps * config.algorithm.mini_batches,
            "seed": config.seed,
            "world": self.ranks,
            "init_method": meeting,
            "revision": config.model.revision,
        }
        self._starting = [a.start.remote({**arguments, "rank": r}) for r, a in enumerate(self._ranks)]

    def wait(self) -> None:
        """Until every rank stands."""
        self.standing: Standing = self._all(self._starting)[0]

    def score(self, batch: MiniBatch, temperature: float | None = None) -> list[list[np.ndarray]]:
        """[rank][micro-batch] -> log-probs of its response tokens, float32 [R]; at the sampler's temperature or another."""
        ranks = zip(self._ranks, batch.ranks, strict=True)
        return self._all([a.call.remote("score", list(m), temperature) for a, m in ranks])

    def update(self, batch: MiniBatch) -> UpdateStats:
        """One optimizer step."""
        return self._all(
            [
                a.call.remote("update", list(m), batch.n_sequences, batch.n_tokens)
                for a, m in zip(self._ranks, batch.ranks, strict=True)
            ]
        )[0]

    def publish(self, version: int, n_tiles: int) -> Published:
        """The policy in the sampler's format; every rank takes part in gathering it, rank 0 makes it."""
        pairs = [a.publish.options(num_returns=2).remote(version, n_tiles) for a in self._ranks]
        header = self._all([header for header, _ in pairs])[0]
        return Published(**header, update=pairs[0][1])

    def save(self, folder: Path) -> None:
        self._all([a.call.remote("save", folder) for a in self._ranks])

    def load(self, folder: Path) -> None:
        self._all([a.call.remote("load", folder) for a in self._ranks])

    def close(self) -> None:
        """End the ranks' processes."""
        for rank in self._ranks:
            ray.kill(rank)

    def _all(self, references: list[Any]) -> list[Any]:
        """Every rank's answer. Where one dies its fellows fail for want of it: it is the one that is named. Raises
        `LearnerError`."""
        try:
            return _get(references)
        except Exception:
            ray.wait(references, num_returns=len(references), timeout=GRACE_S)
            for rank, reference in enumerate(references):
                try:
                    ray.get(reference, timeout=0)
                except RayActorError as death:
                    raise LearnerError(
                        f"learner rank {rank} died: {death}\n  resume=auto continues from the newest checkpoint"
                    ) from death
                except Exception:
                    continue  # a rank that lives: its error is the one being handled, or follows from it
            raise


class Sampler:
    """All engines as one sampler; each takes a contiguous share of the prompts."""

    def __init__(self, config: RunConfig, model: str) -> None:
        self._config = config
        self._arguments = engine_arguments(config, model)
        self._restarts = config.rollout.restarts
        self._published: Published | None = None
        self._engines = [_spawn_engine(config) for _ in range(config.rollout.replicas)]
        self._starting = [self._start(e) for e in self._engines]
        self.contract_hash = ""
        self.restarted = 0
        """Engines started again so far."""

    def wait(self) -> None:
        """Until every engine stands."""
        for index, starting in enumerate(self._starting):
            try:
                self.contract_hash = _get(starting)
            except RayActorError as death:
                self._replace(index, death)

    def refill(self, published: Published) -> list[RefillReport]:
        """Every engine takes the update and proves it. Raises `SyncError`."""
        self._published = published
        return self._ask(lambda engine, _: engine.refill.remote(published.update))

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray) -> list[Completion]:
        """n completions a prompt, in the order of the prompts; `seeds`: int64 [prompts, n]."""
        bounds = np.linspace(0, len(prompts), len(self._engines) + 1).astype(int)
        shares = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
        answers = self._ask(lambda e, r: e.call.remote("generate", prompts[shares[r]], sampling, seeds[shares[r]]))
        return [completion for answer in answers for completion in answer]

    def score(self, sequences: Sequence[np.ndarray], prompt_lengths: Sequence[int]) -> list[list[np.ndarray]]:
        """[engine][sequence] -> log-probs of the tokens after the prompt, as each engine serves them."""
        return self._ask(lambda engine, _: engine.call.remote("score", sequences, prompt_lengths))

    def _ask(self, call: Callable[[Any, int], Any]) -> list[Any]:
        """`call(engine, index)` on every engine; one that dies is replaced, refilled, and asked again. Its first answer never
        arrived, so nothing is counted twice."""
        pending = [call(engine, i) for i, engine in enumerate(self._engines)]
        answers = []
        for i, reference in enumerate(pending):
            while True:
                try:
                    answers.append(_get(reference))
                    break
                except RayActorError as death:
                    self._replace(i, death)
                    reference = call(self._engines[i], i)
        return answers

    def _replace(self, index: int, death: Exception) -> None:
        if self.restarted >= self._restarts:
            raise EngineError(
                f"engine {index} died: {death}. It was started again {self.restarted} times already (rollout.restarts)"
            ) from death
        self.restarted += 1
        self._engines[index] = engine = _spawn_engine(self._config)
        try:
            self.contract_hash = _get(self._start(engine))
            if self._published is not None:
                _get(engine.refill.remote(self._published.update))
        except RayActorError as again:
            self._replace(index, again)

    def _start(self, engine: Any) -> Any:
        return engine.start.remote(self._arguments)


@dataclass(frozen=True)
class Cluster:
    """The run's processes."""

    learner: LearnerGroup
    sampler: Sampler

    @classmethod
    @contextmanager
    def open(cls, config: RunConfig, model: str) -> Iterator[Cluster]:
        """Start Ray, the learner and the engines side by side; stop them all at the end, whatever happened."""
        with ray_session(config):
            learner = LearnerGroup(config, model)
            if config.placement.gpus and config.placement.mode == "colocate":
                # vLLM measures the device's memory while it starts, and takes what others allocate meanwhile for its own.
                learner.wait()
            sampler = Sampler(config, model)
            learner.wait()
            sampler.wait()
            yield cls(learner, sampler)


@contextmanager
def sampler_only(config: RunConfig, model: str) -> Iterator[Sampler]:
    """Engines without a learner, refilled once with the weights of the folder or hub model as they are."""
    with ray_session(config):
        sampler = Sampler(config, model)
        publishing: Any = ray.remote(_publish_folder).options(num_cpus=0, num_returns=2).remote(config, model)
        header, update = publishing
        sampler.wait()
        sampler.refill(Published(**_get(header), update=update))
        yield sampler


def _publish_folder(config: RunConfig, model: str) -> tuple[dict[str, Any], Any]:
    import torch

    from qarl.trainer.model import load_model
    from qarl.trainer.publish import make_update

    policy = load_model(model, getattr(torch, config.model.dtype), config.model.revision)
    return _with_header(
        make_update(policy.named_parameters(), formats.get(config.rollout.format), 0, config.sync.tiles)
    )


def _with_header(update: WeightUpdate) -> tuple[dict[str, Any], WeightUpdate]:
    header = {
        "version": update.version,
        "contract_hash": update.contract_hash,
        "n_bytes": update.n_bytes,
        "seconds": dict(update.seconds),
    }
    return header, update


@contextmanager
def ray_session(config: RunConfig) -> Iterator[None]:
    """A Ray of our own, or the running one at `placement.address`."""
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # else workers would rebuild the environment
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # spares that lack our runtime_env are never used
    address = config.placement.address
    here: dict[str, Any] = {} if address else {"num_gpus": config.placement.gpus, "include_dashboard": False}
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **here)
    try:
        yield
    finally:
        ray.shutdown()


def engine_arguments(config: RunConfig, model: str) -> dict[str, Any]:
    """What both engines are built from."""
    return {
        "config": config.rollout,
        "path": model,
        "dtype": config.model.dtype,
        "max_tokens": config.model.max_tokens,
        "tile_tolerance": config.sync.tile_tolerance,
    }


def _spawn_learner(config: RunConfig) -> Any:
    threads = config.learner.threads or max(1, (os.cpu_count() or 1) // config.learner.ranks)
    return ray.remote(_LearnerActor).options(**_resources(config, 1, threads)).remote()


def _spawn_engine(config: RunConfig) -> Any:
    return (
        ray.remote(_EngineActor)
        .options(**_resources(config, config.rollout.tensor_parallel, os.cpu_count() or 1))
        .remote()
    )


def _resources(config: RunConfig, gpus: int, threads: int) -> dict[str, Any]:
    """Ray reserves no CPU: engine and learner take turns on all of them. Colocated, each holds half of a GPU."""
    share = gpus * (0.5 if config.placement.mode == "colocate" else 1.0) if config.placement.gpus else 0
    return {"num_cpus": 0, "num_gpus": share, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}}}


def _get(references: Any) -> Any:
    """`ray.get`, with an actor's own exception as it was raised there."""
    try:
        return ray.get(references)
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, Exception):
            raise cause from error
        raise
