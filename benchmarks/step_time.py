"""What a step spends its seconds on: `python -m benchmarks.step_time RUN` reads a finished run's `metrics.jsonl`.

Written to `results/step_time_<device>.json`, by this machine's device: read a run where it ran.
`loop` is everything but sampling, forward, backward and optimizer: sync with its proof, rewards, packing, logging, Ray.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.timing import device_name
from qarl import jsonl

WORK = ("time/sample_s", "time/score_s", "learn/forward_s", "learn/backward_s", "learn/optimizer_s")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--skip", type=int, default=2, help="first steps, which warm up")
    arguments = parser.parse_args(argv)
    rows = [r for r in jsonl.read(arguments.run / "metrics.jsonl") if "time/sample_s" in r][arguments.skip :]
    # An evaluation or a checkpoint is not part of every step.
    step = np.array([r["time/step_s"] - r.get("time/evaluate_s", 0) - r.get("time/checkpoint_s", 0) for r in rows])
    names = sorted({n for r in rows for n in r if n.startswith(("time/", "learn/", "sync/")) and n.endswith("_s")})
    table: list[dict[str, Any]] = [
        {"stage": n, "seconds": float(np.mean([r.get(n, 0.0) for r in rows]))} for n in names
    ]
    work = np.array([sum(r[name] for name in WORK) for r in rows])
    table.append({"stage": "step without evaluation and checkpoint", "seconds": float(step.mean())})
    table.append(
        {"stage": "loop: all but sampling, forward, backward, optimizer", "seconds": float((step - work).mean())}
    )
    for row in table:
        row["share"] = row["seconds"] / float(step.mean())
    print(record.table(table, {"stage": "", "seconds": ".3f", "share": ".1%"}))
    print("written to", record.write(f"step_time_{device_name()}", table, steps=len(rows)))


if __name__ == "__main__":
    main()
