"""What a run came to: `summary.json`, and three lines for whoever started it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from qarl import jsonl
from qarl.config import RunConfig
from qarl.progress import duration
from qarl.rundir import write_atomically


def summarize(config: RunConfig, run_dir: Path, seconds: float) -> dict[str, Any]:
    """Computed from `metrics.jsonl`, so that a resumed run sums up all of its steps. `seconds` are those of this process
    alone, start-up included."""
    rows = jsonl.read(run_dir / "metrics.jsonl")
    accuracy = [float(row["accuracy/heldout"]) for row in rows if "accuracy/heldout" in row]
    mismatch = [float(row["mismatch/mean_abs"]) for row in rows if "mismatch/mean_abs" in row]
    return {
        "accuracy_start": accuracy[0] if accuracy else None,
        "accuracy_end": accuracy[-1] if accuracy else None,
        "mismatch_mean_abs": float(np.mean(mismatch)) if mismatch else None,
        "seconds": round(sum(float(row.get("time/step_s", 0)) for row in rows), 1),
        "process_seconds": round(seconds, 1),
        "steps": max((row["step"] for row in rows), default=0),
        "engine": config.rollout.engine,
        "format": config.rollout.format,
        "seed": config.seed,
    }


def conclude(config: RunConfig, run_dir: Path, seconds: float) -> str:
    """Write `summary.json`; returns the closing lines."""
    summary = summarize(config, run_dir, seconds)
    write_atomically(run_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
    lines = [f"report: {run_dir / 'report.html'}"]
    start, end, mismatch = (summary[k] for k in ("accuracy_start", "accuracy_end", "mismatch_mean_abs"))
    if isinstance(start, float) and isinstance(end, float):
        temperature = config.evaluation.temperature
        drawn = f"at temperature {temperature:g}" if temperature else "greedy"
        lines.append(
            f"held-out accuracy {start:.3f} -> {end:.3f} ({drawn}, sampled by {config.rollout.engine} at {config.rollout.format})"
        )
    if isinstance(mismatch, float):
        lines.append(f"sampler and learner ({config.learner.backend}) differ by {mismatch:.2e} nats a token")
    took = f"this process took {duration(seconds)}, start-up included"
    lines.append(f"{summary['steps']} steps in {duration(summary['seconds'])}; {took}")
    return "\n".join(lines)
