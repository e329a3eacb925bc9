"""What a run left behind, as far as it got: what the report is made of."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from qarl import jsonl
from qarl.errors import ConfigError
from qarl.metrics import METRICS, STAGES


@dataclass(frozen=True)
class RunData:
    """Everything may be missing: a run that has just begun left next to nothing."""

    config_text: str
    config: dict[str, Any]
    summary: dict[str, Any]
    """Of these very steps; `{}` also where it is that of an earlier end, which the run has been continued from."""
    samples: list[dict[str, Any]]
    steps: np.ndarray
    """int [S], those logged."""
    columns: dict[str, np.ndarray]
    """Metric -> float [S]; NaN where the step did not log it, or logged NaN."""
    broken: Counter[str]
    """Metric -> steps that logged NaN or infinity."""

    def get(self, name: str) -> np.ndarray:
        return self.columns.get(name, np.full(len(self.steps), np.nan))

    def finite(self, name: str) -> np.ndarray:
        values = self.get(name)
        return values[np.isfinite(values)]

    def configured(self, *keys: str) -> Any:
        """`configured("rollout", "format")`: from the configuration, `None` where it is missing."""
        tree: Any = self.config
        for key in keys:
            tree = tree.get(key) if isinstance(tree, dict) else None
        return tree

    @property
    def format(self) -> str:
        return str(self.summary.get("format") or self.configured("rollout", "format") or "")

    @property
    def rollouts(self) -> np.ndarray:
        """bool [S]: rows that are about a rollout. The one after the last update holds an accuracy alone."""
        return np.isfinite(self.get("reward/mean"))

    @property
    def steps_done(self) -> int:
        return int(self.steps[-1] + self.rollouts[-1]) if len(self.steps) else 0

    @property
    def accuracy(self) -> tuple[float | None, float | None]:
        """Held-out, at the start and at the end; the end is `None` while there is one measurement only."""
        measured = self.finite("accuracy/heldout")
        start = self.summary.get("accuracy_start", measured[0] if len(measured) else None)
        return start, self.summary.get("accuracy_end", measured[-1] if len(measured) > 1 else None)

    def stage_seconds(self) -> dict[str, float]:
        """Stage (`sample`, `learn`, …) -> seconds over the whole run, those that took any."""
        totals = {name: float(self.finite(name).sum()) for name in STAGES}
        return {stage(name): seconds for name, seconds in totals.items() if seconds > 0}


def stage(name: str) -> str:
    """`time/sample_s` -> `sample`."""
    return name.partition("/")[2].removesuffix("_s")


def load(run_dir: Path) -> RunData:
    config_file, summary_file = run_dir / "config.yaml", run_dir / "summary.json"
    config_text = config_file.read_text(errors="replace") if config_file.exists() else ""
    try:
        config = yaml.safe_load(config_text)
        summary = json.loads(summary_file.read_text()) if summary_file.exists() else {}
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{run_dir}: config.yaml or summary.json cannot be read: {error}") from error
    rows = jsonl.read(run_dir / "metrics.jsonl")
    current = summary.get("steps") == max((row["step"] for row in rows), default=0)
    names = dict.fromkeys(name for row in rows for name in row if name in METRICS)
    return RunData(
        config_text=config_text,
        config=config if isinstance(config, dict) else {},
        summary=summary if current else {},
        samples=jsonl.read(run_dir / "samples.jsonl"),
        steps=np.array([row["step"] for row in rows], dtype=int),
        columns={name: np.array([float(row.get(name, math.nan)) for row in rows]) for name in names},
        broken=Counter(name for row in rows for name in names if not math.isfinite(float(row.get(name, 0)))),
    )
