"""The ladder of alignment as a figure: `python -m benchmarks.ladder`, from `results/alignment_h200.json`.

How far three learners are from the engine that wrote the tokens, and the engine from itself (its prefill against its decode), at
each low-bit format. Zero differences are drawn at the left edge.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import record

#: Where in a row's record a rung stands -> label and colour.
RUNGS = {
    "none": ("BF16 learner", "#c0392b"),
    "fused": ("the engine's products alone", "#e0a030"),
    "auto": ("aligned: every op of the engine", "#1f77b4"),
    "engine_self": ("the engine against itself", "#555555"),
}
MARKS = {"none": "o", "fused": "o", "auto": "o", "engine_self": "|"}
EDGE = 4e-8
"""Nats a token: the place of a zero on a logarithmic axis, below the float32 rounding of a softmax."""


def rungs(row: dict[str, Any]) -> dict[str, float]:
    """Mean |Δ log-prob| of one (model, format), nats a token; a learner that failed is left out."""
    found = {name: result.get("mean_abs") for name, result in row["backends"].items() if name in RUNGS}
    found["engine_self"] = row["engine_self"]["mean_abs"]
    return {name: found[name] for name in RUNGS if found.get(name) is not None}


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8.5, 0.42 * len(rows) + 1.3), constrained_layout=True)
    for place, row in enumerate(rows):
        values = rungs(row)
        axis.plot([max(min(values.values()), EDGE), max(values.values())], [place, place], color="#dddddd", zorder=1)
        for name, value in values.items():
            label, color = RUNGS[name]
            axis.scatter(
                max(value, EDGE), place, s=60, marker=MARKS[name], color=color, zorder=2, label=None if place else label
            )
    axis.set_yticks(range(len(rows)), [f"{row['model'].removesuffix('-4l')}  {row['format']}" for row in rows])
    axis.invert_yaxis()
    axis.set(xscale="log", xlabel="mean |learner − sampler|, nats a token (left edge: 0)")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.grid(axis="x", alpha=0.25)
    axis.legend(frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", default=record.RESULTS / "alignment_h200.json")
    file: Path = parser.parse_args().file
    rows = [row for row in json.loads(file.read_text())["rows"] if row["format"] != "bf16" and "engine_self" in row]
    draw(rows, file.with_suffix(".png"))
    print("written to", file.with_suffix(".png"))


if __name__ == "__main__":
    main()
