"""The smallest run that learns something: sums of three digits, a pocket model that gets one in six right."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from qarl.cli import compose
from qarl.config import RunConfig

SUMS = "options={min_terms: 3, max_terms: 3, min_digits: 1, max_digits: 1}"
SMALL = (
    "recipe=quickstart",
    "model.pocket.steps=80",
    "model.pocket.min_terms=3",
    "model.pocket.max_terms=3",
    "model.pocket.worked_share=0",
    f"data.train.{SUMS}",
    f"data.heldout.{SUMS}",
    "data.train.size=500",
    "data.heldout.size=8",
    "steps=4",
    "algorithm.prompts=4",
    "algorithm.group=4",
    "algorithm.mini_batches=2",
    "rollout.sampling.max_tokens=8",
    "learner.optimizer.warmup=0",
    "checkpoint.every=2",
    "logging.wandb=disabled",
)
MARK = "QARL_TEST_PROCESSES"


class Runner:
    """Command lines in processes of their own, and what is left of them."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def command(self, name: str, *overrides: str, program: tuple[str, ...] = ("-m", "qarl.train")) -> list[str]:
        small = SMALL if "model=folder" not in overrides else [o for o in SMALL if not o.startswith("model.pocket.")]
        return [sys.executable, *program, *small, f"out={self.out}", f"name={name}", *overrides]

    def run(self, name: str, *overrides: str, program: tuple[str, ...] = ("-m", "qarl.train")):
        command = self.command(name, *overrides, program=program)
        return subprocess.run(command, capture_output=True, text=True, timeout=400, env=_marked(name))

    def start(self, name: str, *overrides: str) -> subprocess.Popen[bytes]:
        """In the background, leading a process group of its own."""
        quiet = subprocess.DEVNULL
        command = self.command(name, *overrides)
        return subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True, env=_marked(name))

    def kill_once(self, process: subprocess.Popen[bytes], condition: Callable[[], bool], group: bool) -> None:
        """SIGKILL, to the driver or to its whole process group, as soon as the condition holds."""
        deadline = time.monotonic() + 300
        while not condition():
            assert process.poll() is None, f"the run ended by itself with {process.returncode}"
            assert time.monotonic() < deadline, "the run did not get so far"
            time.sleep(0.01)
        (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
        process.wait()

    def left_over(self, name: str, patience: float) -> list[str]:
        """Commands of processes that the runs of that name started and that still live after so many seconds."""
        deadline = time.monotonic() + patience
        while (living := _living(name)) and time.monotonic() < deadline:
            time.sleep(0.2)
        return living


def _marked(name: str) -> dict[str, str]:
    return {**os.environ, MARK: f"{os.getpid()}-{name}"}


def _living(name: str) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == f"{os.getpid()}-{name}" and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline())[:200])
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Pocket models are made once, for this session."""
    os.environ.setdefault("QARL_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def small() -> Callable[..., RunConfig]:
    """`small("steps=1", …)`: the small run's configuration with changes."""
    return lambda *overrides: compose(*SMALL, *overrides)


@pytest.fixture(scope="session")
def untrained(small: Callable[..., RunConfig]) -> str:
    """Folder of a pocket model with random weights, which never stops by itself."""
    from qarl.prepare import prepare

    return prepare(small("model.pocket.steps=0")).model
