"""Table and figures of `benchmarks.stability`, from its result file alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.stability_arms import ARMS, BASELINE, taken

PANELS = {
    "accuracy/heldout": ("held-out accuracy, by the arm's own engine", "linear"),
    "reward/mean": ("reward of the rollouts", "linear"),
    "mismatch/mean_abs": ("|learner − sampler|, nats a token", "log"),
    "mismatch/k3": ("KL(sampler ‖ learner), nats a token", "log"),
    "entropy": ("entropy, nats a token", "linear"),
    "error_tokens/repetition_rate": ("tokens inside repeated n-grams, share", "linear"),
    "grad_norm": ("gradient norm", "log"),
}
STAGES = ("publish", "sample", "reward", "score", "learn")
COLUMNS = {
    "model": "",
    "arm": "",
    "seeds": "d",
    "first": ".3f",
    "last": ".3f",
    "spread": ".3f",
    "points": "+.1f",
    "policy_bf16": ".3f",
    "policy_served": ".3f",
    "mismatch": ".1e",
    "k3": ".1e",
    "entropy": ".3f",
    "error_tokens": ".1%",
    "clip_high": ".1%",
    "clip_low": ".1%",
    "step_s": ".2f",
    "speed": ".2f",
    "reached_s": ".0f",
}
COLORS = {
    ("bf16", "gspo", ""): "#c0392b",
    ("bf16", "gspo", "tis"): "#e67e22",
    ("bf16", "gspo", "mis"): "#d4ac0d",
    ("aligned", "gspo", ""): "#17a589",
    ("aligned", "dual_clip", ""): "#8e44ad",
    ("aligned", "tbpo", ""): "#1f77b4",
}
"""Learner, objective, correction; the baseline is black."""
STYLES = {"bf16": "-", "w4a16": "-", "w8a8_int8": "--", "w8a8_fp8": ":"}
REACHED = 0.5
"""Accuracy whose wall-clock the table tells."""


def series(rows: Iterable[dict[str, Any]], metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps [S] at which every row measured `metric`, and its values [rows, S]. None in common: S = 0."""
    found = []
    for row in rows:
        values = row["curves"].get(metric, [])
        found.append({s: v for s, v in zip(row["curves"]["step"], values, strict=False) if v is not None})
    steps = sorted(set.intersection(*(set(f) for f in found))) if found else []
    return np.array(steps), np.array([[f[s] for s in steps] for f in found], float)


def step_seconds(row: dict[str, Any]) -> np.ndarray:
    """Seconds of each step [S] without evaluation and checkpoint, which are no part of every step."""
    curves = row["curves"]
    none = [None] * len(curves["step"])
    parts = zip(*(curves.get(f"time/{name}_s", none) for name in ("step", "evaluate", "checkpoint")), strict=True)
    return np.array([(step or 0.0) - (evaluate or 0.0) - (checkpoint or 0.0) for step, evaluate, checkpoint in parts])


def reached(row: dict[str, Any], accuracy: float) -> float | None:
    """Seconds of training until a held-out evaluation first showed `accuracy`; `None`: it never did."""
    clock = np.cumsum(step_seconds(row))
    for index, value in enumerate(row["curves"].get("accuracy/heldout", [])):
        if value is not None and value >= accuracy:
            return float(clock[index - 1]) if index else 0.0
    return None


def until(rows: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """Every run as if it had ended with the accuracy of version `step`: what was stopped later has finished too."""

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        steps = row["curves"]["step"]
        n = sum(s <= step for s in steps)
        curves = {name: values[:n] for name, values in row["curves"].items()}
        return row | {"curves": curves, "steps": n and steps[n - 1]} | ({"status": "finished"} if step in steps else {})

    return [cut(row) for row in rows]


def conclude(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each model and arm, over its finished seeds: means, and the accuracy's standard deviation over seeds.

    `points`: of accuracy against the baseline, percentage points, over the seeds that both have; `speed`: the baseline's step over
    the arm's. `reached_s` is told where every seed reached `REACHED`.
    """
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        arms = {a: [r for r in rows if (r["model"], r["arm"], r["status"]) == (model, a, "finished")] for a in ARMS}
        found += [_conclude(model, arm, mine, arms[BASELINE]) for arm, mine in arms.items() if mine]
    return found


def _conclude(model: str, arm: str, rows: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> dict[str, Any]:
    first, last = (np.array([_measured(row, "accuracy/heldout")[i] for row in rows]) for i in (0, -1))
    theirs = {row["seed"]: _measured(row, "accuracy/heldout")[-1] for row in baseline}
    lost = [value - theirs[row["seed"]] for value, row in zip(last, rows, strict=True) if row["seed"] in theirs]
    seconds, base = (
        np.median(np.concatenate([step_seconds(r)[1:-1] for r in g])) if g else None for g in (rows, baseline)
    )
    times = [reached(row, REACHED) for row in rows]

    def mean(metric: str) -> float | None:
        values = [v for row in rows for v in _measured(row, metric)]
        return float(np.mean(values)) if values else None

    def chance(format: str) -> float | None:
        values = [row["policy"][format] for row in rows if format in row.get("policy", ())]
        return float(np.mean(values)) if values else None

    return {
        "model": model,
        "arm": arm,
        "seeds": len(rows),
        "first": float(first.mean()),
        "last": float(last.mean()),
        "spread": float(last.std(ddof=1)) if len(last) > 1 else None,
        "points": 100 * float(np.mean(lost)) if lost else None,
        "policy_bf16": chance("bf16"),
        "policy_served": chance(taken(model, ARMS[arm].format)),
        "mismatch": mean("mismatch/mean_abs"),
        "k3": mean("mismatch/k3"),
        "entropy": float(np.mean([_measured(row, "entropy")[-1] for row in rows])),
        "error_tokens": mean("error_tokens/repetition_rate"),
        "clip_high": mean("clip/positive_high"),
        "clip_low": mean("clip/negative_low"),
        "step_s": seconds,
        "speed": base / seconds if base is not None else None,
        "reached_s": None if None in times else float(np.mean([t for t in times if t is not None])),
    }


def _measured(row: dict[str, Any], metric: str) -> list[float]:
    return [value for value in row["curves"].get(metric, []) if value is not None]


def table(rows: list[dict[str, Any]]) -> str:
    unfinished = [
        f"{r['model']} {r['arm']} seed {r['seed']}: {r['status']} at {r['steps']}"
        for r in rows
        if r["status"] != "finished"
    ]
    return "\n".join([record.table(conclude(rows), COLUMNS), *unfinished])


def draw(rows: list[dict[str, Any]], file: Path) -> list[Path]:
    """A figure for each model beside `file`: curves over steps, mean of the finished seeds with their range, and time by stage."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    for model in dict.fromkeys(row["model"] for row in rows if row["status"] == "finished"):
        arms = {a: [r for r in rows if (r["model"], r["arm"], r["status"]) == (model, a, "finished")] for a in ARMS}
        arms = {arm: mine for arm, mine in arms.items() if mine}
        figure, axes = plt.subplots(2, 4, figsize=(20, 9), constrained_layout=True)
        for axis, (metric, (title, scale)) in zip(axes.flat, PANELS.items(), strict=False):
            for arm, mine in arms.items():
                _line(axis, arm, *series(mine, metric))
            axis.set(title=title, xlabel="step", yscale=scale)
            axis.grid(alpha=0.25)
        _stages(axes.flat[-1], arms)
        for axis in axes.flat:
            axis.spines[["top", "right"]].set_visible(False)
        handles, names = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
        target = file.with_name(f"{file.stem}_{model}.png")
        figure.savefig(target, dpi=110)
        plt.close(figure)
        written.append(target)
    return written


def _line(axis: Any, arm: str, steps: np.ndarray, values: np.ndarray) -> None:
    if len(steps):
        one = ARMS[arm]
        color = "black" if arm == BASELINE else COLORS[one.learner, one.objective, one.correction]
        axis.plot(steps, values.mean(0), label=one.label, color=color, linestyle=STYLES[one.format])
        axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.08, linewidth=0)


def _stages(axis: Any, arms: dict[str, list[dict[str, Any]]]) -> None:
    """Median seconds of each stage, stacked, an arm a bar."""
    left = np.zeros(len(arms))
    for stage in STAGES:
        median = [
            np.median([v for row in mine for v in _measured(row, f"time/{stage}_s")[2:]] or [0.0])
            for mine in arms.values()
        ]
        axis.barh(list(arms), median, left=left, label=stage)
        left += median
    axis.invert_yaxis()
    axis.set(title="time by stage", xlabel="seconds a step, other runs beside it")
    axis.legend(frameon=False, fontsize=8, ncols=5, loc="upper center", bbox_to_anchor=(0.4, -0.1))
