"""The run's processes as the loop speaks to them: all ranks of the learner as one policy, all engines as one sampler.

| worker  | consumes                         | produces               | waits for        |
|---------|----------------------------------|------------------------|------------------|
| learner | micro-batches, from the loop     | log-probs, statistics, | its fellow ranks |
|         |                                  | published versions     |                  |
| engine  | published versions, prompts,     | completions            | nobody           |
|         | seeds                            |                        |                  |

The loop calls them in turn, so colocated workers compute at the same time in a sync alone. The loop holds no weights: versions
go from learner to engines by a bridge (`qarl.bridge`). An engine that dies is started again, refilled to the current version, and
asked again; a learner that dies ends the run, which `resume=auto` continues. `Cluster.open` owns start and stop of everything.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError

from qarl import formats
from qarl.actors import GRACE_S, EngineActors, answers, first_death, get, reserve, spawn_learner, with_header
from qarl.batching import pack_to_score
from qarl.bridge import Bridge, OverLines, ThroughHost
from qarl.config import LearnerConfig, RunConfig
from qarl.errors import ConfigError, EngineError, LearnerError, LineLost
from qarl.records import (
    Completion,
    MiniBatch,
    Prompt,
    Published,
    RefillReport,
    Sampling,
    Standing,
    SyncRequest,
    UpdateStats,
)
from qarl.transfer import PeerLost


class LearnerGroup:
    """All ranks of the learner as one policy that can be scored, stepped and published."""

    def __init__(self, config: RunConfig, model: str) -> None:
        self.ranks = config.learner.ranks
        self.tokens = config.learner.tokens
        """Of a micro-batch, at most."""
        self._ranks = [spawn_learner(config, rank) for rank in range(self.ranks)]
        meeting = self._all([self._ranks[0].rendezvous.remote()])[0]
        arguments = {
            "config": _as_the_engine_computes(config),
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
            "engine_ranks": config.rollout.tensor_parallel,
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
        ranks = zip(self._ranks, batch.ranks, strict=True)
        asked = [a.call.remote("update", list(m), batch.n_sequences, batch.n_tokens) for a, m in ranks]
        stats: UpdateStats = self._all(asked)[0]
        return replace(stats, sums={**stats.sums, "dropped": stats.sums["dropped"] + batch.n_kept_back})

    def make_room(self) -> None:
        """For engines that sleep on the learner's GPUs, and will wake or be started again there."""
        self._all([rank.call.remote("make_room") for rank in self._ranks])

    def publish(self, request: SyncRequest) -> tuple[Published, Any]:
        """The policy in the sampler's format, and Ray's reference to it; every rank takes part in gathering, rank 0 makes it."""
        pairs = [a.publish.options(num_returns=2).remote(request.version, request.n_tiles) for a in self._ranks]
        header = self._all([header for header, _ in pairs])[0]
        return Published(**header, canaries=self.score(request.canaries, temperature=1.0)), pairs[0][1]

    def hold_lines(self, carrier: str, engines: Sequence[EngineActors]) -> list[Any]:
        """From now on rank 0 publishes to all ranks of these engines, or by `ipc` rank i to the i-th of them, over a line to each;
        `None` of each engine, or its death."""
        callers = [actor for engine in engines for actor in engine.ranks]
        shares = [[actor] for actor in callers] if carrier == "ipc" else [callers]
        ranks = self._ranks[: len(shares)]
        doors = self._all([rank.open_door.remote() for rank in ranks])
        calling = iter(
            [a.call.remote("connect", door) for share, door in zip(shares, doors, strict=True) for a in share]
        )
        asked = [[next(calling) for _ in engine.ranks] for engine in engines]
        answering = [r.call.remote("answer", carrier, len(share)) for r, share in zip(ranks, shares, strict=True)]
        found = answers(engines, asked, LineLost, OSError, EOFError)
        dead = any(isinstance(answer, RayActorError) for answer in found)
        lost = [answer for answer in found if answer is not None]
        if lost and not dead:  # perhaps for want of a learner, whose error is the one to name
            done, _ = ray.wait(answering, num_returns=len(answering), timeout=GRACE_S)
            with suppress(PeerLost, TimeoutError):
                self._all(done)
            raise lost[0]
        try:
            self._all(answering)
        except (PeerLost, TimeoutError):  # of an engine that died
            if not dead:
                raise
        return found

    def publish_to_lines(self, request: SyncRequest) -> Callable[[], Published]:
        """Publish over all lines; what is returned waits until it is done."""
        pairs = zip(self._ranks, request.canaries.ranks, strict=True)
        arguments = ("publish_to_line", request.version, request.n_tiles)
        publishing = [rank.call.remote(*arguments, canaries) for rank, canaries in pairs]

        def wait() -> Published:
            told = self._all(publishing)
            n_bytes, seconds, _ = told[0]
            scores = [its for *_, its in told]
            return Published(request.version, self.standing.contract_hash, n_bytes, seconds, scores)

        return wait

    def save(self, folder: Path) -> None:
        self._all([a.call.remote("save", folder.absolute()) for a in self._ranks])  # actors may work in another folder

    def load(self, folder: Path) -> None:
        self._all([a.call.remote("load", folder.absolute()) for a in self._ranks])

    def close(self) -> None:
        """End the ranks' processes."""
        for rank in self._ranks:
            ray.kill(rank)

    def _all(self, references: list[Any]) -> list[Any]:
        """Every rank's answer. Where one dies its fellows fail for want of it: it is the one that is named. Raises
        `LearnerError`."""
        try:
            return get(references)
        except Exception:
            if found := first_death(references):
                rank, death = found
                raise LearnerError(
                    f"learner rank {rank} died: {death}\n  resume=auto continues from the newest checkpoint"
                ) from death
            raise


Check = Callable[[Published, Sequence[RefillReport]], None]
"""Raises `SyncError` where learner and engines do not mean the same."""


class Sampler:
    """All engines as one sampler; each takes a contiguous share of the prompts."""

    def __init__(self, config: RunConfig, model: str, bridge: Bridge) -> None:
        self._config, self._bridge = config, bridge
        self._arguments = engine_arguments(config, model)
        self._asked: tuple[SyncRequest, Check] | None = None
        self._engines = [EngineActors(config, index) for index in range(config.rollout.replicas)]
        self._starting = [engine.start(self._arguments) for engine in self._engines]
        self.restarted = 0
        """Engines started again so far."""

    def wait(self) -> None:
        """Until every engine stands, and has a line to the learner."""
        self._replace_dead(answers(self._engines, self._starting))
        self._connect()

    def refill(self, request: SyncRequest, check: Check = lambda *_: None) -> tuple[Published, list[RefillReport]]:
        """Every engine takes the learner's weights and proves them. `check` holds both sides' words against each other, now and
        whenever an engine is started again at this version. Raises `SyncError`, as it does."""
        self._asked = request, check
        while True:
            published, found = self._bridge.deliver(self._engines, request)
            if not self._replace_dead(found):
                reports = [report for report in found if isinstance(report, RefillReport)]
                check(published, reports)
                return published, reports
            self._connect()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray) -> list[Completion]:
        """n completions a prompt, in the order of the prompts; `seeds`: int64 [prompts, n]."""
        bounds = np.linspace(0, len(prompts), len(self._engines) + 1).astype(int)
        shares = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
        found = self._ask(lambda e, i: e.ask("generate", prompts[shares[i]], sampling, seeds[shares[i]]))
        return [completion for answer in found for completion in answer]

    def sleep(self) -> None:
        """Engines give their GPU memory to the learner, until the next refill."""
        while self._replace_dead(answers(self._engines, [engine.ask("sleep") for engine in self._engines])):
            self._connect()
            self._refill_again()  # which wakes the others: all are asked again

    def _ask(self, call: Callable[[EngineActors, int], list[Any]]) -> list[Any]:
        """`call(engine, index)` on every engine; those that die are replaced, refilled, and asked again. Their first answers never
        arrived, so nothing is counted twice."""
        found = answers(self._engines, [call(engine, i) for i, engine in enumerate(self._engines)])
        while dead := self._replace_dead(found):
            self._connect()
            self._refill_again()
            again = [self._engines[i] for i in dead]
            for i, answer in zip(dead, answers(again, [call(self._engines[i], i) for i in dead]), strict=True):
                found[i] = answer
        return found

    def _refill_again(self) -> None:
        if self._asked:
            self.refill(*self._asked)

    def _connect(self) -> None:
        """Lines to all engines, also where one dies as it calls."""
        while self._replace_dead(self._bridge.connect(self._engines)):
            pass

    def _replace_dead(self, found: Sequence[Any]) -> list[int]:
        """Start engines again that died in the place of an answer; returns which."""
        dead = {index: answer for index, answer in enumerate(found) if isinstance(answer, RayActorError)}
        for index, death in dead.items():
            self._replace(index, death)
        return list(dead)

    def _replace(self, index: int, death: RayActorError) -> None:
        while True:
            if self.restarted >= self._config.rollout.restarts:
                raise EngineError(
                    f"engine {index} died: {death}. It was started again {self.restarted} times already (rollout.restarts)"
                ) from death
            self.restarted += 1
            engine = self._engines[index] = EngineActors(self._config, index)
            (answer,) = answers([engine], [engine.start(self._arguments)])
            if not isinstance(answer, RayActorError):
                return
            death = answer


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
            carrier = config.carrier
            bridge = ThroughHost(learner.publish) if carrier == "host" else OverLines(carrier, learner)
            sampler = Sampler(config, model, bridge)
            learner.wait()
            sampler.wait()
            yield cls(learner, sampler)


def _as_the_engine_computes(config: RunConfig) -> LearnerConfig:
    """The torch engine's arithmetic is the definition's: `auto` means that, even where vLLM's ops are at hand."""
    if config.rollout.engine == "torch" and config.learner.backend == "auto":
        return replace(config.learner, backend="emulated")
    return config.learner


@contextmanager
def sampler_only(config: RunConfig, model: str) -> Iterator[Sampler]:
    """Engines without a learner, refilled once with the weights of the folder or hub model as they are."""

    def publish(request: SyncRequest) -> tuple[Published, Any]:
        publishing: Any = ray.remote(_publish_folder).options(num_cpus=0, num_returns=2).remote(config, model)
        header, update = publishing
        return Published(**get(header), canaries=[]), update

    with ray_session(config):
        sampler = Sampler(config, model, ThroughHost(publish))
        sampler.wait()
        nobody, _ = pack_to_score([], 1, 1)
        sampler.refill(SyncRequest(0, config.sync.tiles, nobody, []))
        yield sampler


def _publish_folder(config: RunConfig, model: str) -> tuple[dict[str, Any], Any]:
    import torch

    from qarl.trainer.model import load_model
    from qarl.trainer.publish import model_update

    policy = load_model(model, getattr(torch, config.model.dtype), config.model.revision)
    return with_header(model_update(policy, formats.get(config.rollout.format), 0, config.sync.tiles))


@contextmanager
def ray_session(config: RunConfig) -> Iterator[None]:
    """A Ray of our own, or the running one at `placement.address`."""
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # else workers would rebuild the environment
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # spares that lack our runtime_env are never used
    address = config.placement.address
    here: dict[str, Any] = {} if address else {"num_gpus": config.placement.gpus, "include_dashboard": False}
    # "local", or a Ray that happens to run here, or that RAY_ADDRESS names, would be joined.
    ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **here)
    try:
        found = int(ray.cluster_resources().get("GPU", 0))
        if config.placement.gpus > found:  # else their reservation would wait for ever
            raise ConfigError(f"placement.gpus: {config.placement.gpus}, but the Ray cluster has {found}")
        reserve(config)
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
        "revision": config.model.revision,
    }
