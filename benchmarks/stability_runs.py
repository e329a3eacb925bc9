"""The runs of `benchmarks.stability`: each a process, several on a GPU, and the file their rows are kept in."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks import record
from benchmarks.stability_arms import Job
from qarl import jsonl
from qarl.errors import ConfigError

CURVES = (
    "accuracy/heldout",
    "reward/mean",
    "mismatch/mean_abs",
    "mismatch/k3",
    "mismatch/ess_sequence",
    "entropy",
    "error_tokens/repetition_rate",
    "error_tokens/share",
    "grad_norm",
    "length/mean",
    "length/truncated",
    "clip/positive_high",
    "clip/negative_low",
    "clip/negative_high",
    "clip/mismatch_high",
    "objective/ratio_max",
    "time/step_s",
    "time/publish_s",
    "time/sample_s",
    "time/reward_s",
    "time/score_s",
    "time/learn_s",
    "time/evaluate_s",
    "time/checkpoint_s",
)
PAUSE_S = 0.3
"""Between looks, and so between starts."""
DONE = ("finished", "diverged")
#: One small run among many: it takes few threads, and a Ray of its own that expects no more memory than it needs.
LIGHT = {
    "OMP_NUM_THREADS": "2",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION": "0.02",
    "RAY_memory_monitor_refresh_ms": "0",
}
Command = Callable[[Job, tuple[str, ...]], list[str]]


def command(job: Job, overrides: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-m", "qarl.train", *overrides]


@dataclass
class Child:
    """A run in its process."""

    job: Job
    overrides: tuple[str, ...]
    folder: Path
    gpu: str
    process: subprocess.Popen[bytes]
    scratch: Path
    started: float
    """By the monotonic clock."""
    began: float
    """By that of the files."""

    @classmethod
    def start(cls, job: Job, overrides: tuple[str, ...], work: Path, gpu: str, command: Command) -> Child:
        """Its output goes to `runs/NAME.log`. Sockets need a short path, so Ray's files go to a scratch folder."""
        scratch = Path(tempfile.mkdtemp(prefix="qs"))
        surroundings = os.environ | LIGHT | {"CUDA_VISIBLE_DEVICES": gpu, "RAY_TMPDIR": str(scratch)}
        folder = work / "runs" / job.name
        folder.parent.mkdir(parents=True, exist_ok=True)
        began = time.time()
        with folder.with_suffix(".log").open("wb") as log:
            process = subprocess.Popen(
                command(job, overrides), stdout=log, stderr=log, env=surroundings, start_new_session=True
            )
        return cls(job, overrides, folder, gpu, process, scratch, time.monotonic(), began)

    def terminate(self) -> bool:
        """Ask its process group to end; whether it was still going on."""
        if self.process.poll() is not None:
            return False
        os.killpg(self.process.pid, signal.SIGTERM)
        return True

    def end(self, grace_s: float = 5.0) -> None:
        """Wait for it, then kill what is left of its session: Ray's agents outlive a driver that was killed, and its actors have
        process groups of their own."""
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):  # it has ended meanwhile
                if os.getsid(process.pid) == self.process.pid:
                    process.kill()

    def row(self, stopped: bool = False) -> dict[str, Any]:
        """What the run came to, as far as it came. `stopped`: by us, unfinished."""
        seconds = time.monotonic() - self.started
        log = self.folder.with_suffix(".log").read_text(errors="replace")
        status = "stopped" if stopped else "finished" if self.process.returncode == 0 else "failed"
        if status == "failed" and "DivergenceError:" in log:
            status = "diverged"
        metrics = self.folder / "metrics.jsonl"
        own = (
            metrics.exists() and metrics.stat().st_mtime >= self.began
        )  # else of a run before, which this one did not get to move
        rows = jsonl.read(metrics) if own else []
        shutil.rmtree(self.scratch, ignore_errors=True)
        return {
            "model": self.job.model,
            "arm": self.job.arm,
            "seed": self.job.seed,
            "status": status,
            "seconds": round(seconds, 1),
            "gpu": self.gpu,
            "steps": len([row for row in rows if "reward/mean" in row]),
            "overrides": list(self.overrides),
            **({"log": log[-800:]} if status in ("failed", "diverged") else {}),
            "curves": curves(rows),
        }


def curves(rows: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Metric -> its value at each logged step, to five digits; `None` where it was not measured."""
    found: dict[str, list[float | None]] = {"step": [row["step"] for row in rows]}
    for name in CURVES:
        values = [float(f"{float(row[name]):.5g}") if name in row else None for row in rows]
        if any(value is not None for value in values):
            found[name] = values
    return found


class Rows:
    """The result file: a row a run, the whole of it on the disk after every change. What it says besides stays as it was first;
    what calls may differ in stands in the rows. Only one process may have it at a time: another's rows would be overwritten."""

    def __init__(self, file: Path) -> None:
        """Raises `ConfigError` where another process has the file."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self._lock = file.with_suffix(".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"--out: another benchmark is writing {file}; wait for it, or choose another") from None
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": []}
        self.file = file
        self.rows: list[dict[str, Any]] = found.pop("rows")
        self.more = found

    def put(self, row: dict[str, Any]) -> None:
        self.rows = [r for r in self.rows if _key(r) != _key(row)] + [row]
        record.write_file(self.file, self.rows, **self.more)

    def finished(self, job: Job, overrides: tuple[str, ...]) -> bool:
        """Raises `ConfigError` where the file's run of that name was another."""
        for row in self.rows:
            if _key(row) == (job.model, job.arm, job.seed) and row["status"] in DONE:
                if row["overrides"] != list(overrides):
                    other = sorted({*row["overrides"]} ^ {*overrides}) or "the same ones in another order"
                    raise ConfigError(
                        f"--out: {self.file} holds {job.name} with other settings, {other}; choose another --out"
                    )
                return True
        return False


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["model"], row["arm"], row["seed"]


def run(
    jobs: Sequence[tuple[Job, tuple[str, ...]]],
    rows: Rows,
    work: Path,
    slots: Sequence[str],
    limit_s: float,
    start: Command = command,
) -> None:
    """All jobs, one a slot at a time; a slot is the GPU it stands for. At the limit, and where this process is told to end, those
    that still go on are stopped.

    A job is not begun when less time is left than the shortest so far took. One that fails, other than by diverging, has a second
    try behind the others: of many that start together one may take a port that another had just found free.
    """
    begun, waiting, free = time.monotonic(), deque(jobs), deque(slots)
    running: list[Child] = []
    tried: set[Job] = set()
    shortest = 0.0

    def keep(child: Child, stopped: bool = False) -> dict[str, Any]:
        child.end()
        row = child.row(stopped) | {"jobs_a_gpu": slots.count(child.gpu), "commit": record.surroundings()["commit"]}
        rows.put(row)
        _say(row)
        return row

    handler = signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # children have sessions of their own
    try:
        while waiting or running:
            left = limit_s - (time.monotonic() - begun)
            if left < shortest:
                waiting.clear()
            if left <= 0:
                return
            if waiting and free:
                job, overrides = waiting.popleft()
                running.append(Child.start(job, overrides, work, free.popleft(), start))
            for child in [c for c in running if c.process.poll() is not None]:
                running.remove(child)
                row = keep(child)
                free.append(child.gpu)
                if row["status"] == "finished":
                    shortest = min(shortest or row["seconds"], row["seconds"])
                elif row["status"] == "failed" and child.job not in tried:
                    tried.add(child.job)
                    waiting.append((child.job, child.overrides))
            time.sleep(PAUSE_S)
    finally:
        stopped = [child.terminate() for child in running]  # all first: each may take a moment
        for child, unfinished in zip(running, stopped, strict=True):
            keep(child, unfinished)
        signal.signal(signal.SIGTERM, handler)


def _say(row: dict[str, Any]) -> None:
    """One line: how far it came, accuracy and reward from first to last, the median step, mean shares beyond the band."""
    known = {name: [v for v in values if v is not None] for name, values in row["curves"].items()}
    told = [
        f"{row['model']} {row['arm']} seed {row['seed']}: {row['status']}, {row['steps']} steps, {row['seconds']:.0f} s"
    ]
    for name in ("accuracy/heldout", "reward/mean"):
        if values := known.get(name):
            told.append(f"{name} {values[0]:.3f} -> {values[-1]:.3f}")
    if values := known.get("time/step_s"):
        told.append(f"step {sorted(values)[len(values) // 2]:.2f} s")
    for name in ("mismatch/mean_abs", "clip/positive_high", "clip/negative_low"):
        if values := known.get(name):
            told.append(f"{name} {sum(values) / len(values):.2g}")
    print(", ".join(told), flush=True)
