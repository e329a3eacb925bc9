"""Several runs on one page: the same charts with a line a run. Runs that differ in their seed alone are one line, their
mean, in a band from the lowest to the highest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from html import escape

import numpy as np

from qarl.charts import Series, line_chart
from qarl.dashboard import SAMPLES, SECTIONS, Chart, Line, Section
from qarl.metrics import show
from qarl.progress import duration
from qarl.report_cards import COLORS, card, grid, legend, samples, series, steps_text
from qarl.run_data import RunData
from qarl.rundir import FREE, leaves, under

NOTHING = "–"


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, whatever their seeds: one line in each chart."""

    runs: Mapping[str, RunData]
    """Label -> run."""
    color: int
    stem: str = ""
    """What the names of several runs begin with, and those of no other group."""

    @property
    def label(self) -> str:
        names = list(self.runs)
        if len(names) == 1:
            return names[0]
        seeds = ", ".join(str(run.configured("seed")) for run in self.runs.values())
        return f"{self.stem or names[0]} (seeds {seeds})"


def comparison(runs: Mapping[str, RunData]) -> list[str]:
    """The body of the page about these runs, label -> run. `ValueError`: more configurations than colours."""
    groups = grouped(runs)
    steps = reduce(np.union1d, (run.steps for run in runs.values()))
    about = (
        "A line a run; runs that differ in their seed alone are one line, their mean, in a band from the lowest to the "
    )
    about += "highest, as far as each of them went. Sections as in the report of one run."
    return [
        f"<header><h1>{len(runs)} runs</h1></header>",
        f'<p class="headline">{about}</p>',
        legend([(group.color, group.label, "") for group in groups]),
        f"<h2>Final numbers</h2>{final_numbers(groups)}",
        f"<h2>What differs in the configurations</h2>{differences(runs)}",
        *(_section(groups, steps, section) for section in SECTIONS),
        f"<h2>{SAMPLES} of the newest step</h2>{_newest_samples(runs)}",
    ]


def grouped(runs: Mapping[str, RunData]) -> list[Group]:
    """In the order given. What does not change what a step computes (`qarl.rundir.FREE`) may differ within a group; runs
    without a configuration stay alone.
    """
    members: dict[str, dict[str, RunData]] = {}
    for label, run in runs.items():
        same = {key: value for key, value in leaves(run.config) if not (under(key, FREE) or _is_seed(key))}
        key = json.dumps(same, sort_keys=True, default=str) if run.config else label
        members.setdefault(key, {})[label] = run
    if len(members) > COLORS:
        raise ValueError(
            f"{len(members)} configurations in {len(runs)} runs; at most {COLORS} can be told apart on a page"
        )
    stems = [os.path.commonprefix(list(group)).rstrip("-_./") for group in members.values()]
    return [
        Group(group, color, stems[color] if stems.count(stems[color]) == 1 else "")
        for color, group in enumerate(members.values())
    ]


def _is_seed(key: str) -> bool:
    """Recipes let the seeds of models and data follow the run's."""
    return key.split(".")[-1] == "seed"


def spread(group: Group, steps: np.ndarray, metrics: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Mean, lowest and highest over the group's runs, each [S], of the sum of these metrics; `None` where no run logged any.

    NaN where one of the runs that logged them has no finite value: a mean of other runs than at the step before would
    jump.
    """
    rows = []
    for run in group.runs.values():
        logged = [run.columns[name] for name in metrics if name in run.columns]
        if logged:
            row = np.full(len(steps), np.nan)
            row[np.searchsorted(steps, run.steps)] = _sum(np.array(logged))
            rows.append(row)
    if not rows:
        return None
    values = np.array(rows)
    values[:, ~np.isfinite(values).all(axis=0)] = np.nan
    return values.mean(axis=0), values.min(axis=0), values.max(axis=0)


def _sum(columns: np.ndarray) -> np.ndarray:
    """[N, S] -> [S]; what a step did not log counts as 0, a step that logged none of them is NaN."""
    return np.where(np.isnan(columns).all(axis=0), np.nan, np.nansum(columns, axis=0))


def _section(groups: Sequence[Group], steps: np.ndarray, section: Section) -> str:
    cards = [_chart(groups, steps, chart) for chart in section.charts]
    return f"<h2>{escape(section.title)}</h2>{grid([c for c in cards if c])}"


def _chart(groups: Sequence[Group], steps: np.ndarray, chart: Chart) -> str:
    """Colours are groups, dashes are metrics. Of a stack, the sum is drawn, and a table has its parts."""
    total = Line("", "all stages")
    lines = [(total, chart.metrics)] if chart.stacked else [(line, (line.metric,)) for line in chart.lines]
    drawn = [
        replace(one, label=f"{group.label}: {line.label}", dash=dash)
        for dash, (line, metrics) in enumerate(lines)
        for group in groups
        if (one := _series(group, steps, line, metrics))
    ]
    if not drawn:
        return ""
    body = line_chart(steps, drawn, log=chart.scale == "log", percent=chart.scale == "percent")
    key = "".join(_dash(dash, line.label) for dash, (line, _) in enumerate(lines) if len(lines) > 1)
    groups_key = legend([(group.color, group.label, "") for group in groups])
    parts = _stage_table(groups, chart) if chart.stacked else ""
    return card(escape(chart.title), escape(chart.hint), body + parts, f'{groups_key}<ul class="legend">{key}</ul>')


def _series(group: Group, steps: np.ndarray, line: Line, metrics: Sequence[str]) -> Series | None:
    found = spread(group, steps, metrics)
    if found is None:
        return None
    mean, low, high = found
    return replace(series(line, mean, group.color), band=(low, high) if len(group.runs) > 1 else None)


def _dash(dash: int, label: str) -> str:
    """An entry of the key of dashes."""
    stroke = f'<line class="key d{dash}" x1="0" x2="34" y1="5" y2="5"/>'
    return f'<li><svg class="key" viewBox="0 0 34 10">{stroke}</svg>{escape(label)}</li>'


def _stage_table(groups: Sequence[Group], chart: Chart) -> str:
    """Mean seconds of a step that logged the stage, over all runs of the group."""
    rows = []
    for line in chart.lines:
        logged = [np.concatenate([run.finite(line.metric) for run in g.runs.values()]) for g in groups]
        rows.append([line.label, *(duration(float(v.mean())) if len(v) else NOTHING for v in logged)])
    return _table(["mean of a step", *(group.label for group in groups)], rows)


def final_numbers(groups: Sequence[Group]) -> str:
    """A row a group: the mean over its runs and, of several, the lowest and the highest."""
    rows = []
    for group in groups:
        runs = list(group.runs.values())
        done = sorted({run.steps_done for run in runs})
        went = steps_text(done[0]) if len(done) == 1 else f"{done[0]} to {steps_text(done[-1])}"
        numbers = [_over_runs(name, [of(run) for run in runs]) for _, name, of in FINAL]
        rows.append([group.label, went, *numbers])
    return f'<div class="card">{_table(["run", "went", *(title for title, _, _ in FINAL)], rows)}</div>'


def _over_runs(name: str, values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return NOTHING
    text = show(name, float(np.mean(known)))
    if len(values) == 1:
        return text
    missing = f", {len(values) - len(known)} missing" if len(known) < len(values) else ""
    return f"{text} ({show(name, min(known))} … {show(name, max(known))}{missing})"


def _mean(name: str, last: int = 0) -> Callable[[RunData], float | None]:
    """Of all steps, or of the last so many."""
    return lambda run: float(run.finite(name)[-last:].mean()) if len(run.finite(name)) else None


def _median(name: str) -> Callable[[RunData], float | None]:
    return lambda run: float(np.median(run.finite(name))) if len(run.finite(name)) else None


FINAL: tuple[tuple[str, str, Callable[[RunData], float | None]], ...] = (
    ("held-out accuracy, start", "accuracy/heldout", lambda run: run.accuracy[0]),
    ("held-out accuracy, end", "accuracy/heldout", lambda run: run.accuracy[1]),
    ("reward, last 10 steps", "reward/mean", _mean("reward/mean", 10)),
    ("mismatch, nats a token", "mismatch/mean_abs", _mean("mismatch/mean_abs")),
    ("tokens/s, median", "tokens_per_s", _median("tokens_per_s")),
    ("seconds a step, median", "time/step_s", _median("time/step_s")),
)
"""Title, the metric it is shown as, the number of a run."""


def differences(runs: Mapping[str, RunData]) -> str:
    """A row a key that differs between the runs that have a configuration, a column a run. Names and folders are left out:
    they head the columns.
    """
    configs = {label: dict(leaves(run.config)) if run.config else {} for label, run in runs.items()}
    known = [config for config in configs.values() if config]
    rows = []
    for key in dict.fromkeys(key for config in known for key in config):
        values = [json.dumps(config.get(key, NOTHING), default=str, ensure_ascii=False) for config in known]
        if len(set(values)) > 1 and key not in ("name", "out"):
            rows.append([key, *(str(config.get(key, NOTHING)) for config in configs.values())])
    missing = [label for label, config in configs.items() if not config]
    note = f'<p class="note">config.yaml is missing: {escape(", ".join(missing))}</p>' if missing else ""
    same = '<p class="empty">Nothing but names.</p>'
    return f'<div class="card">{note}{_table(["key", *runs], rows) if rows else same}</div>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column names the row, the others are its numbers."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f"<tr><td>{escape(first)}</td>" + "".join(f'<td class="number">{escape(c)}</td>' for c in rest) + "</tr>"
        for first, *rest in rows
    )
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def _newest_samples(runs: Mapping[str, RunData]) -> str:
    columns = []
    for label, run in runs.items():
        if run.samples:
            step = run.samples[-1]["step"]
            columns.append((f"{label}: step {step}", [row for row in run.samples if row["step"] == step]))
    return samples(columns)
