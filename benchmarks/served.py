"""What a refilled engine serves beside a fresh one on the exported checkpoint: `python -m benchmarks.served`.

One engine is refilled three times with other weights, CUDA graphs on. Each policy is exported too, and vLLM's own front end loads
that checkpoint from its files. Both write greedy completions of the same prompts and score those of the refilled engine. Greedy
tokens are to be equal, and log-probs as close as either engine is to itself when asked the same again (`spread`). Four layers of
Qwen3-8B's and Qwen3-30B-A3B's widths, random weights; written to `results/served_h200.json`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.alignment_gpu import CPU_FORMATS, FORMATS, is_wanted
from benchmarks.jobs import run_job
from benchmarks.random_models import NAMES, make_model

REFILLS = 3


def do(model: str, format: str, folders: list[Path], work: Path, gpu: str | None, limit: float) -> dict[str, Any]:
    """Run one job on that GPU; its record, or as far as it got, with the end of its log where it failed."""
    out = work / f"{model}-{format}.json"
    words = ["benchmarks.served_job", format, str(out), *map(str, folders)]
    environment = {"OMP_NUM_THREADS": "2"} | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    return {"model": model, "format": format} | run_job(words, out, environment, limit)


def visible_gpus() -> list[str | None]:
    """Names that a child's CUDA_VISIBLE_DEVICES may say; of a machine without a GPU, one that is none."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    return [*named.split(",")] if torch.cuda.is_available() else [None]


def judge(row: dict[str, Any]) -> dict[str, Any]:
    """With the worst of a job's refills."""
    refills = row.get("refills", [])
    row["done"] = len(refills)
    if not refills:
        return row
    row["same"] = sum(r["same_sequences"] for r in refills)
    row["of"] = sum(r["sequences"] for r in refills)
    row["gap"] = max(max(r["gap_scores"], r["gap_drawn"] or 0.0) for r in refills)
    row["spread"] = max(max(r["spread_refilled"], r["spread_fresh"]) for r in refills)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", help="part of the names of models to measure; all, where none is given")
    parser.add_argument("--formats", nargs="*", choices=FORMATS, help="all of this device, where none is given")
    parser.add_argument("--tiny", action="store_true", help="narrow models, for a CPU")
    parser.add_argument("--parallel", type=int, default=5, help="jobs at a time on each GPU")
    parser.add_argument("--limit", type=float, default=300, help="seconds of one job, then it is killed")
    parser.add_argument("--work", type=Path, help="folder for models, records and logs")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="served-"))
    work.mkdir(parents=True, exist_ok=True)
    gpus = visible_gpus()
    models = [name for name in NAMES if is_wanted(name, arguments.models)]
    folders = {name: [work / f"{name}-{seed}" for seed in range(REFILLS)] for name in models}
    for name in models:
        for seed, folder in enumerate(folders[name]):
            if not folder.exists():
                make_model(name, folder, arguments.tiny, seed)
    torch.cuda.empty_cache()
    name = "h200" if gpus != [None] and "H200" in torch.cuda.get_device_name() else "gpu"
    out = work / "served_tiny.json" if arguments.tiny else record.RESULTS / f"served_{name}.json"
    formats = arguments.formats or (CPU_FORMATS if gpus == [None] else FORMATS)
    cases = [(name, format) for name in reversed(models) for format in formats]
    with ThreadPoolExecutor(arguments.parallel * len(gpus)) as pool:
        jobs = [
            pool.submit(do, name, format, folders[name], work, gpus[i % len(gpus)], arguments.limit)
            for i, (name, format) in enumerate(cases)
        ]
        rows: list[dict[str, Any]] = []
        for job in as_completed(jobs):
            rows.append(judge(job.result()))
            written = record.write_file(out, rows)  # each time: what is cut off keeps what was done
    columns = {"model": "", "format": "", "done": "d", "same": "d", "of": "d", "gap": ".1e", "spread": ".1e"}
    print(record.table(rows, columns))
    for row in rows:
        if "error" in row:
            print(f"{row['model']} {row['format']}: {row['error']}")
    print("written to", written)


if __name__ == "__main__":
    main()
