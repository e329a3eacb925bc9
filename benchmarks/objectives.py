"""Objectives side by side on low-bit rollouts of the pocket model: `python -m benchmarks.objectives`.

Arms differ in what they name alone: same prompts, same seeds, same number of updates, several mini-batches a rollout. Writes
`results/objectives_cpu.json` and `results/objectives_cpu.png`; the runs stay in `runs/objectives/`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from qarl import jsonl

OUT = Path("runs/objectives")
#: Ratio bands of sequence objectives, as recipe `quickstart` widens them for responses of tens of tokens.
ARMS = {
    "BF16 GRPO": ("algorithm=grpo", "rollout.format=bf16", "learner.backend=none"),
    "unaligned GRPO": ("algorithm=grpo", "learner.backend=none"),
    "unaligned GRPO + TIS": (
        "algorithm=grpo",
        "learner.backend=none",
        "algorithm.objective.correction.kind=tis",
        "algorithm.objective.correction.cap=2.0",
    ),
    "aligned GSPO": ("algorithm.objective.bounds.negative_high=null", "algorithm.objective.correction.kind=none"),
    "aligned TBPO": (),
}
CURVES = ("accuracy/heldout", "mismatch/mean_abs", "mismatch/k3", "reward/mean", "entropy", "grad_norm")


def run(arm: str, seed: int, extra: list[str]) -> Path:
    """One run, in processes of its own; returns its folder. A finished one is not run again."""
    name = f"{arm.lower().replace(' ', '_').replace('+', 'plus')}_seed{seed}"
    folder = OUT / name
    if (folder / "summary.json").exists():
        return folder
    command = [sys.executable, "-m", "qarl.train", "recipe=quickstart", f"out={OUT}", f"name={name}", f"seed={seed}"]
    command += ["evaluation.every=5", "logging.wandb=disabled", "resume=auto", *ARMS[arm], *extra]
    print("$", " ".join(command[1:]), flush=True)
    subprocess.run(command, check=True)
    return folder


def curves(folder: Path) -> dict[str, list[list[float]]]:
    """Metric -> [[step, value], …]."""
    rows = jsonl.read(folder / "metrics.jsonl")
    return {name: [[row["step"], float(row[name])] for row in rows if name in row] for name in CURVES}


def conclude(arm: str, seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """The arm's row: means over seeds, and the spread of the accuracy."""
    start = [seed["curves"]["accuracy/heldout"][0][1] for seed in seeds]
    end = [seed["curves"]["accuracy/heldout"][-1][1] for seed in seeds]
    best = [max(v for _, v in seed["curves"]["accuracy/heldout"]) for seed in seeds]
    mismatch = [np.mean([v for _, v in seed["curves"]["mismatch/mean_abs"]]) for seed in seeds]
    return {
        "arm": arm,
        "accuracy_start": float(np.mean(start)),
        "accuracy_end": float(np.mean(end)),
        "accuracy_end_min": float(min(end)),
        "accuracy_end_max": float(max(end)),
        "accuracy_best": float(np.mean(best)),
        "mismatch_mean_abs": float(np.mean(mismatch)),
        "seeds": seeds,
    }


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Accuracy and mismatch over steps, a line an arm (mean over seeds), the spread of seeds as a band."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    for row in rows:
        for axis, name in ((left, "accuracy/heldout"), (right, "mismatch/mean_abs")):
            series = [np.array(seed["curves"][name]) for seed in row["seeds"]]
            steps, values = series[0][:, 0], np.stack([s[:, 1] for s in series])
            (line,) = axis.plot(steps, values.mean(0), label=row["arm"])
            axis.fill_between(steps, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    left.set(xlabel="step", ylabel="held-out accuracy (greedy)", title="Accuracy")
    right.set(xlabel="step", ylabel="mean |learner - sampler|, nats a token", yscale="log", title="Mismatch")
    left.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.savefig(file, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("overrides", nargs="*", help="of every arm, e.g. steps=20")
    arguments = parser.parse_args()
    rows = []
    for arm in ARMS:
        seeds = [{"seed": s, "curves": curves(run(arm, s, arguments.overrides))} for s in arguments.seeds]
        rows.append(conclude(arm, seeds))
    columns = {"arm": "", "accuracy_start": ".3f", "accuracy_end": ".3f", "accuracy_end_min": ".3f"}
    columns |= {"accuracy_end_max": ".3f", "accuracy_best": ".3f", "mismatch_mean_abs": ".1e"}
    print(record.table(rows, columns))
    file = record.write("objectives_cpu", rows)
    plot(rows, file.with_suffix(".png"))
    print("written to", file, "and", file.with_suffix(".png"))


if __name__ == "__main__":
    main()
