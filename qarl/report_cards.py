"""The parts of the report: each function makes a piece of HTML of a run, with everything from outside escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any, Literal

import numpy as np

from qarl.charts import Series, area_chart, line_chart
from qarl.dashboard import Chart, Line, Section
from qarl.metrics import METRICS, show
from qarl.progress import duration
from qarl.run_data import RunData

COLORS = 9
"""The page defines `--c0` … `--c8`."""
DASHES = 5
"""The page defines `.d1` … `.d4`; `.d0` is solid."""
SAMPLE_FACTS = (("tokens", " tokens"), ("finish", ""))


def steps_text(count: int) -> str:
    """`1 step`, `60 steps`."""
    return f"{count} step{'s' * (count != 1)}"


def tiles(run: RunData) -> str:
    """Key numbers."""

    def tile(label: str, value: str, note: str = "") -> str:
        return (
            f'<div class="card tile"><div class="label">{label}</div><div class="value">{value}</div>'
            f'<div class="note">{note}</div></div>'
        )

    found = []
    start, end = run.accuracy
    now = end if end is not None else start
    if now is not None:
        found.append(
            tile("Held-out accuracy", f"{now:.1%}", f"{start:.1%} at the start" if end is not None else "so far")
        )
    reward = run.finite("reward/mean")
    if len(reward):
        few = min(10, len(reward))
        first, last = reward[:few].mean(), reward[-few:].mean()
        found.append(tile("Reward", f"{last:.3f}", f"mean of the last {steps_text(few)}; first: {first:.3f}"))
    mean, largest = run.finite("mismatch/mean_abs"), run.finite("mismatch/max_abs")
    if len(mean):
        note = f"nats a token; largest {largest.max():.2g}" if len(largest) else "nats a token"
        found.append(tile("Mismatch", f"{mean.mean():.2g}", note))
    speed, each = run.finite("tokens_per_s"), run.get("time/step_s")[run.rollouts]
    each = each[np.isfinite(each)]
    if len(speed):
        found.append(tile("Speed", f"{np.median(speed):,.0f}", "sampled tokens/s, median step"))
    if len(each):
        found.append(tile("A step", duration(float(np.median(each))), f"median of {len(each)}"))
    publish, size = run.finite("time/publish_s"), run.finite("sync/gb")
    if len(publish):
        note = f"median; {size[-1]:.3g} GB to the engine" if len(size) else "median"
        found.append(tile("Weight sync", duration(float(np.median(publish))), note))
    return "".join(found)


def card(title: str, note: str, body: str, legend: str = "") -> str:
    return f'<article class="card"><h3>{title}</h3><p class="note">{note}</p>{legend}{body}</article>'


def legend(entries: Sequence[tuple[int, str, str]]) -> str:
    """(colour, what, its value)."""
    items = (f'<li><i style="background:var(--c{c})"></i>{escape(t)} <b>{escape(v)}</b></li>' for c, t, v in entries)
    return f'<ul class="legend">{"".join(items)}</ul>'


def grid(cards: Sequence[str]) -> str:
    body = "".join(cards) or '<div class="card"><p class="empty">Nothing was logged yet.</p></div>'
    return f'<section class="charts">{body}</section>'


def color_rules() -> str:
    """CSS of the charts' colours."""
    return "\n".join(_color_rule(i) for i in range(COLORS))


def _color_rule(i: int) -> str:
    filled = ", ".join(f".{kind}.c{i}" for kind in ("area", "mark", "dot", "band"))
    return f".line.c{i} {{ stroke: var(--c{i}); }} {filled} {{ fill: var(--c{i}); }}"


def section(run: RunData, one: Section) -> str:
    """The charts of a section, those without any logged metric left out."""
    cards = [(_stack if chart.stacked else _lines)(run, chart) for chart in one.charts]
    return f"<h2>{escape(one.title)}</h2>{grid([c for c in cards if c])}"


def series(line: Line, values: np.ndarray, color: int) -> Series:
    """`values` [S], drawn in the line's style."""
    kind: Literal["line", "points"] = "points" if line.style == "points" else "line"
    combine: Literal["mean", "max"] = "max" if line.style == "peak" else "mean"
    return Series(line.label, values, color, kind, combine, smooth=line.style == "smooth")


def _lines(run: RunData, chart: Chart) -> str:
    logged = [(color, line) for color, line in enumerate(chart.lines) if line.metric in run.columns]
    if not logged:
        return ""
    entries = []
    for color, line in logged:
        finite, broken = run.finite(line.metric), run.broken[line.metric]
        gaps = f" ({steps_text(broken)} not finite)" if broken else ""
        entries.append((color, line.label, (show(line.metric, finite[-1]) if len(finite) else "–") + gaps))
    drawn = [series(line, run.get(line.metric), color) for color, line in logged]
    body = line_chart(run.steps, drawn, log=chart.scale == "log", percent=chart.scale == "percent")
    return card(escape(chart.title), escape(chart.hint), body, legend(entries))


def _stack(run: RunData, chart: Chart) -> str:
    """Seconds; the legend, from the top of the stack down, has the mean of a step and the share of the whole."""
    total = {line.metric: float(run.finite(line.metric).sum()) for line in chart.lines}
    whole = sum(total.values())
    spent = [(color, line) for color, line in enumerate(chart.lines) if total[line.metric] > 0]
    if not spent:
        return ""
    timed = np.any([np.isfinite(run.get(line.metric)) for _, line in spent], axis=0)
    entries = [
        (color, line.label, f"{duration(total[line.metric] / timed.sum())} · {total[line.metric] / whole:.0%}")
        for color, line in reversed(spent)
    ]
    drawn = [series(line, run.get(line.metric)[timed], color) for color, line in spent]
    note = f"{escape(chart.hint)} In all {duration(whole)}; below, the mean of a step and the share."
    return card(escape(chart.title), note, area_chart(run.steps[timed], drawn), legend(entries))


def early_and_late(rows: Sequence[Mapping[str, Any]]) -> str:
    """Responses of the first and of the newest logged step, beside each other."""
    steps = [(f"step {step}", list(group)) for step, group in groupby(rows, key=lambda row: row["step"])]
    chosen = [steps[0], steps[-1]] if len(steps) > 1 else steps
    return samples([(f"{when}: {step}", group) for when, (step, group) in zip(("Early", "Late"), chosen, strict=False)])


def samples(columns: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], most: int = 3) -> str:
    """(title, rows of `samples.jsonl`): a few responses of each, in columns."""
    if not columns:
        return '<div class="card"><p class="empty">No response was kept yet.</p></div>'
    parts = (
        f"<div><h3>{escape(title)}</h3>{''.join(_sample(row) for row in rows[:most])}</div>" for title, rows in columns
    )
    return f'<section class="samples">{"".join(parts)}</section>'


def _sample(row: Mapping[str, Any]) -> str:
    reward = float(row.get("reward", 0.0))
    facts = [f'<span class="pill {"good" if reward > 0 else "bad"}">reward {reward:.3g}</span>']
    facts += [f'<span class="pill">{escape(str(row[key]))}{unit}</span>' for key, unit in SAMPLE_FACTS if key in row]
    response = escape(str(row.get("response", ""))) or "<i>empty</i>"
    return (
        f'<article class="card sample"><div class="prompt text">{escape(str(row.get("prompt", "")))}</div>'
        f'<div class="text response">{response}</div><div class="facts">{"".join(facts)}'
        f'<span class="pill">answer {escape(str(row.get("answer", "")))}</span></div></article>'
    )


def newest(run: RunData) -> str:
    """A table of the newest value of each metric."""
    rows = "".join(
        f'<tr><td>{name}</td><td class="number">{show(name, run.finite(name)[-1])}</td><td>{metric.unit}</td>'
        f"<td>{escape(metric.meaning)}</td></tr>"
        for name, metric in METRICS.items()
        if len(run.finite(name))
    )
    return f'<table class="metrics"><tr><th>metric</th><th>newest</th><th>unit</th><th>meaning</th></tr>{rows}</table>'
