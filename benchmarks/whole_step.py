"""What a whole step of Qwen3-30B-A3B comes to at each format, over bf16: `python -m benchmarks.whole_step`.

No run of that size is behind it. It adds up what `benchmarks.rollout`, `benchmarks.learner` and `benchmarks.refill` measured on
one GPU, as they stand in `results/`: a batch of rollouts sampled at all layers; as many tokens scored once and learnt from once,
with gradient checkpointing, from the learner's times at one layer and at three, on a line to all layers; one sync with its proof.
The optimizer and what GPUs of a sharded learner tell each other are left out: neither depends on the format. Written to
`results/whole_step_h200.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import record

FORMATS = ("bf16", "w4a16", "w8a8_int8", "w8a8_fp8")
"""What all three benchmarks measured."""
STAGES = ("sample", "score", "forward", "backward")
SECONDS = [f"{stage}_s" for stage in (*STAGES, "sync", "step")]
COLUMNS = {"format": "", "m": "", **dict.fromkeys(SECONDS, ".2f"), "over_bf16": ".2f"}
Rows = list[dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    files = {name: record.RESULTS / f"{name}_h200.json" for name in ("rollout", "learner", "refill")}
    told = {name: json.loads(file.read_text()) for name, file in files.items()}
    rollout, learner, refill = told.values()
    rows = compose(rollout, learner["rows"], refill["rows"])
    machine = {key: learner[key] for key in ("hardware", "versions")}  # the measurements', not this one's
    record.write("whole_step_h200", rows, **machine, commits={name: commits(one) for name, one in told.items()})
    print(record.table(rows, COLUMNS))
    return 0


def compose(rollout: dict[str, Any], learner: Rows, refill: Rows) -> Rows:
    """A row for each format and number of sequences: seconds of each stage, and how many times faster than bf16 the step is.

    bf16's learner is the faster of the two that were measured. Raises `KeyError` where a measurement is missing.
    """
    tokens = rollout["prompt_tokens"] + rollout["new_tokens"]
    sampled = {(r["format"], r["m"]): r["seconds"] for r in rollout["rows"] if r["backend"] == "qarl"}
    synced = {r["format"]: r["median_s"] for r in refill}
    rows: Rows = []
    for m in sorted({m for _, m in sampled}):
        for format in FORMATS:
            row = {"format": format, "m": m, "sample_s": sampled[format, m]}
            row |= {f"{s}_s": ms / 1e3 * m * tokens for s, ms in per_token(learner, format, rollout["layers"]).items()}
            row |= {"sync_s": synced[format]}
            row["step_s"] = sum(value for key, value in row.items() if key.endswith("_s"))
            rows.append(row)
    steps = {row["m"]: row["step_s"] for row in rows if row["format"] == "bf16"}
    return [row | {"over_bf16": steps[row["m"]] / row["step_s"]} for row in rows]


def per_token(learner: Rows, format: str, layers: int) -> dict[str, float]:
    """Milliseconds of score, forward and backward a token at `layers` layers, on the line through the two depths measured. The
    first two compute the same with checkpointing as without, and a row is a few steps: the least counts."""
    lines = []
    for backend in {row["backend"] for row in learner if row["format"] == format}:
        few, many = (_times(learner, name, format, backend) for name in ("one_expert_layer", "experts"))
        slope = {stage: (many[stage] - few[stage]) / (many["layers"] - few["layers"]) for stage in STAGES[1:]}
        lines.append({stage: few[stage] + slope[stage] * (layers - few["layers"]) for stage in slope})
    return min(lines, key=lambda line: sum(line.values()))


def _times(learner: Rows, name: str, format: str, backend: str) -> dict[str, float]:
    """Milliseconds a token, and `layers`."""
    rows = [r for r in learner if r["layer"].startswith(f"{name},") and "ms" in r]
    rows = [r for r in rows if (r["format"], r["backend"]) == (format, backend)]
    saved = [r for r in rows if r["layer"].endswith("checkpointing")]
    if not saved:
        raise KeyError(f"learner: no row of {name} with checkpointing, {format}, {backend}")
    alike = {stage: min(r[f"{stage}_ms"] / r["m"] for r in rows) for stage in ("score", "forward")}
    return {**alike, "backward": min(r["backward_ms"] / r["m"] for r in saved), "layers": saved[0]["layers"]}


def commits(result: dict[str, Any]) -> list[str]:
    """What a result file was measured at: as a whole, or row by row."""
    return sorted({result["commit"]} if "commit" in result else {row["commit"] for row in result["rows"]})


if __name__ == "__main__":
    sys.exit(main())
