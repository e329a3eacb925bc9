"""Rewards: responses scored in processes that can be killed, one deadline each.

A plain pool of processes over pipes. Workers answer response by response, so the reply to one marks the start of the
next: deadlines are exact although a worker is handed several at a time, and a death is always that of a known response.
"""

from __future__ import annotations

import logging
import math
import multiprocessing as mp
import os
import resource
import signal
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait

import numpy as np
import psutil

from qarl import scoring
from qarl.config import RewardConfig
from qarl.errors import ConfigError
from qarl.records import Prompt
from qarl.scoring import Score

CHUNK = 8
"""Responses handed to a worker at a time."""
START_S = 120.0
"""A worker that cannot score after this long will never."""
TIMEOUT = "it took longer than reward.timeout_s"

logger = logging.getLogger(__name__)
# Forking the driver would copy the locks of Ray's threads. The fork server is a fresh process that has imported the
# scorer once, so that a killed worker is replaced without seconds of imports.
_processes = mp.get_context("forkserver")

Item = tuple[str, str, Mapping[str, object]]
"""Response, answer, extras."""


@dataclass(frozen=True)
class Rewards:
    """Of the responses of one call, in their order."""

    values: np.ndarray
    """float64 [n]; 0 where scoring was given up."""
    timed_out: np.ndarray
    """bool [n]: took longer than `reward.timeout_s`."""
    crashes: int
    """Responses on which the scorer failed: out of memory, a dead worker, an error."""
    seconds: float
    """Wall time of the call."""

    @property
    def timeouts(self) -> int:
        return int(self.timed_out.sum())


class Rewarder:
    """Scores responses in `config.workers` processes.

    `score` takes the place of `config.kind`; processes must be able to import it by name.
    """

    def __init__(self, config: RewardConfig, score: Score | None = None):
        self._config = config
        self._score = score or scoring.SCORES[config.kind]
        self._workers: list[_Worker] = []
        _processes.set_forkserver_preload(["numpy", __name__, *scoring.MODULES[config.kind]])

    def __enter__(self) -> Rewarder:
        forkserver.ensure_running()  # it imports while the caller goes on
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        while self._workers:
            self._workers.pop().kill()

    def score(self, responses: Sequence[str], prompts: Sequence[Prompt]) -> Rewards:
        """Rewards of responses[i] to prompts[i]. Whatever a response does, it costs itself only.

        Raises `ConfigError` where the prompts lack what the kind needs, `RuntimeError` where no worker can be started.
        """
        started = time.perf_counter()
        end = self._config.max_chars
        self._require_fields(prompts)
        items = [(r[-end:], p.answer, p.extras) for r, p in zip(responses, prompts, strict=True)]
        outcomes: list[float | str] = ["" for _ in items]
        for index, outcome in self._run(items):
            outcomes[index] = outcome
        failures = [(i, reason) for i, reason in enumerate(outcomes) if isinstance(reason, str)]
        timed_out = np.array([outcome == TIMEOUT for outcome in outcomes], dtype=bool)
        if failures:
            index, reason = failures[0]
            logger.warning(
                "%d of %d rewards given up; prompt %d: %s", len(failures), len(items), prompts[index].id, reason
            )
        values = np.array([0.0 if isinstance(outcome, str) else outcome for outcome in outcomes], dtype=np.float64)
        return Rewards(values, timed_out, len(failures) - int(timed_out.sum()), time.perf_counter() - started)

    def _run(self, items: Sequence[Item]) -> Iterator[tuple[int, float | str]]:
        """(index, reward or the reason why there is none) of each item, as they are done."""
        while len(self._workers) < self._config.workers:
            self._workers.append(self._start())
        todo = deque(range(len(items)))
        done = 0
        while done < len(items):
            for worker in self._workers:
                if worker.ready and not worker.pending and todo:
                    chunk = [todo.popleft() for _ in range(min(CHUNK, len(todo)))]
                    worker.send(chunk, items)
            patience = max(0.0, min(worker.deadline for worker in self._workers) - time.monotonic())
            heard = wait([worker.pipe for worker in self._workers], None if math.isinf(patience) else patience)
            for place, worker in enumerate(self._workers):
                outcome = worker.receive() if worker.pipe in heard else worker.overdue()
                if outcome is not None:
                    yield worker.pending.popleft(), outcome
                    done += 1
                if not worker.alive:
                    todo.extendleft(reversed(worker.pending))
                    self._workers[place] = self._start()

    def _start(self) -> _Worker:
        return _Worker(self._score, self._config)

    def _require_fields(self, prompts: Sequence[Prompt]) -> None:
        if self._score is scoring.reasoning_gym:
            for prompt in prompts:
                if not {"task", "options", "question", "metadata"} <= prompt.extras.keys():
                    raise ConfigError(
                        "reward.kind: reasoning_gym scores rows of reasoning_gym:TASK; choices for others: math, exact"
                    )


class _Worker:
    """One process, seen from outside."""

    def __init__(self, score: Score, config: RewardConfig):
        self.pipe, theirs = _processes.Pipe()
        self.process = _processes.Process(target=_serve, args=(theirs, score, config), name="qarl-reward", daemon=True)
        self.process.start()
        theirs.close()
        self.timeout = config.timeout_s
        self.ready = False
        self.alive = True
        self.pending: deque[int] = deque()
        """Indices of items it was sent; it is at the first."""
        self.deadline = time.monotonic() + START_S

    def send(self, chunk: Sequence[int], items: Sequence[Item]) -> None:
        self.pending.extend(chunk)
        self.deadline = time.monotonic() + self.timeout
        try:
            self.pipe.send([items[index] for index in chunk])
        except OSError:  # dead: `receive` finds out
            pass

    def receive(self) -> float | str | None:
        """The outcome of its first item; `None` for the word that it is ready."""
        try:
            outcome = self.pipe.recv()
        except (EOFError, OSError):
            return self._died()
        self.ready = True
        self.deadline = time.monotonic() + self.timeout if len(self.pending) > 1 else math.inf
        return outcome

    def overdue(self) -> str | None:
        if time.monotonic() < self.deadline:
            return None
        self.kill()
        if not self.ready:
            raise RuntimeError(f"a reward worker was not ready after {START_S:.0f} s")
        return TIMEOUT

    def kill(self) -> None:
        self.alive = False
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def _died(self) -> str | None:
        self.kill()
        if not self.ready:
            raise RuntimeError(f"a reward worker ended with code {self.process.exitcode} before it was ready")
        return f"its worker ended with code {self.process.exitcode}" if self.pending else None


WARM_UP = (r"\boxed{\frac{1}{2}}", "1/2")
"""A response and an answer that `math` has to parse."""


def _serve(pipe: Connection, score: Score, config: RewardConfig) -> None:
    """The life of a worker: `None` once it is warm, then a reward or a reason for each response."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's, which ends its workers
    try:
        score(*WARM_UP, {})  # the imports and caches of the first call, before any deadline runs
    except Exception:
        pass  # a scorer may want extras; what is wrong with real responses is reported with them
    limit = psutil.Process().memory_info().vms + config.memory_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe.send(None)
    while True:
        try:
            items = pipe.recv()
        except EOFError:  # the driver is gone
            return
        for item in items:
            _limit_cpu(2 * config.timeout_s + 2)
            pipe.send(_outcome(score, item))


def _outcome(score: Score, item: Item) -> float | str:
    try:
        value = float(score(*item))
    except MemoryError:
        os._exit(1)  # what is left of the heap is in pieces
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]
    return value if math.isfinite(value) else f"the scorer returned {value}"


def _limit_cpu(seconds: float) -> None:
    """If the driver is killed nobody is left to end an endless loop: the kernel does."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(used.ru_utime + used.ru_stime + seconds)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
