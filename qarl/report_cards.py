"""The parts of the report: each function makes a piece of HTML of a run, with everything from outside escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from itertools import groupby
from typing import Any

import numpy as np

from qarl.charts import Series, area_chart, line_chart
from qarl.metrics import METRICS, STAGES, show
from qarl.progress import duration
from qarl.run_data import RunData, stage

COLORS = 9
"""The page defines `--c0` … `--c8`."""


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
    if len(speed):
        found.append(tile("Speed", f"{np.median(speed):,.0f}", "sampled tokens/s, median step"))
    if len(each):
        found.append(tile("A step", duration(float(np.median(each))), f"median of {len(each)}"))
    publish, size = run.finite("time/publish_s"), run.finite("sync/gb")
    if len(publish):
        note = f"median; {size[-1]:.3g} GB to the engine" if len(size) else "median"
        found.append(tile("Weight sync", duration(float(np.median(publish))), note))
    return "".join(found)


def _card(title: str, note: str, body: str, legend: str = "") -> str:
    return f'<article class="card"><h3>{title}</h3><p class="note">{note}</p>{legend}{body}</article>'


def _lines(run: RunData, title: str, note: str, series: Sequence[Series], names: Sequence[str], **axis: bool) -> str:
    """A line chart with its legend; empty where none of its metrics was ever logged."""
    present = [(s, name) for s, name in zip(series, names, strict=True) if name in run.columns]
    if not present:
        return ""
    legend = []
    for one, name in present:
        finite = run.finite(name)
        broken = run.broken[name]
        gaps = f" ({steps_text(broken)} not finite)" if broken else ""
        last = show(name, finite[-1]) if len(finite) else "–"
        legend.append((one.color, one.label, last + gaps))
    return _card(title, note, line_chart(run.steps, [s for s, _ in present], **axis), _legend(legend))


def _legend(entries: Sequence[tuple[int, str, str]]) -> str:
    items = (f'<li><i style="background:var(--c{c})"></i>{escape(t)} <b>{escape(v)}</b></li>' for c, t, v in entries)
    return f'<ul class="legend">{"".join(items)}</ul>'


def color_rules() -> str:
    """CSS of the charts' colours."""
    return "\n".join(_color_rule(i) for i in range(COLORS))


def _color_rule(i: int) -> str:
    return f".line.c{i} {{ stroke: var(--c{i}); }} .area.c{i}, .mark.c{i}, .dot.c{i} {{ fill: var(--c{i}); }}"


def learning(run: RunData) -> str:
    """Is it getting better, and how healthy are the updates?"""
    n = run.get
    reward = [
        Series("reward, mean of the step", n("reward/mean"), 0, smooth=True),
        Series("held-out accuracy", n("accuracy/heldout"), 1, "points"),
    ]
    clip = [
        Series("A > 0, above", n("clip/positive_high"), 0),
        Series("A < 0, below", n("clip/negative_low"), 2),
        Series("A < 0, above", n("clip/negative_high"), 1),
        Series("mismatch weight above its cap", n("clip/mismatch_high"), 3),
    ]
    length = [Series("mean", n("length/mean"), 0), Series("longest", n("length/max"), 1, combine="max")]
    garbled = [
        Series("tokens in loops", n("error_tokens/repetition_rate"), 3),
        Series("responses mostly loop", n("error_tokens/share"), 1),
        Series("responses cut off", n("length/truncated"), 5),
    ]
    return _grid(
        [
            _lines(
                run, "Reward and held-out accuracy", "Higher is better.", reward, ["reward/mean", "accuracy/heldout"]
            ),
            _lines(
                run,
                "Clip fractions",
                "Share without gradient, by sign of the advantage A and side of the bound.",
                clip,
                ["clip/positive_high", "clip/negative_low", "clip/negative_high", "clip/mismatch_high"],
                percent=True,
            ),
            _lines(
                run,
                "Entropy",
                "Nats a token. Falling to zero: collapse. Rising late: error tokens.",
                [Series("entropy", n("entropy"), 4)],
                ["entropy"],
            ),
            _lines(run, "Response length", "Tokens.", length, ["length/mean", "length/max"]),
            _lines(
                run,
                "Gradient norm",
                "Before clipping; log axis.",
                [Series("largest of the step", n("grad_norm"), 6, combine="max")],
                ["grad_norm"],
                log=True,
            ),
            _lines(
                run,
                "Error tokens",
                "Loops of repeated tokens, which low-bit policies fall into.",
                garbled,
                ["error_tokens/repetition_rate", "error_tokens/share", "length/truncated"],
                percent=True,
            ),
        ]
    )


def mismatch(run: RunData) -> str:
    """How far is the sampler from the learner?"""
    gap = [
        Series("largest", run.get("mismatch/max_abs"), 1, combine="max"),
        Series("mean", run.get("mismatch/mean_abs"), 0),
    ]
    effective = [
        Series("of tokens", run.get("mismatch/ess_token"), 0),
        Series("of responses", run.get("mismatch/ess_sequence"), 2),
    ]
    return _grid(
        [
            _lines(
                run,
                "Mismatch",
                "|learner − sampler| log-prob of the sampled tokens, nats; log axis. Flat is good.",
                gap,
                ["mismatch/max_abs", "mismatch/mean_abs"],
                log=True,
            ),
            _lines(
                run,
                "Effective sample size",
                "Share of the sample that importance weights would leave; 100% when both sides agree.",
                effective,
                ["mismatch/ess_token", "mismatch/ess_sequence"],
                percent=True,
            ),
        ]
    )


def time(run: RunData) -> str:
    """Where the seconds went, over the steps and in all."""
    series = [Series(stage(name), run.get(name), i) for i, name in enumerate(STAGES) if run.finite(name).sum() > 0]
    cards = []
    if series:
        timed = np.any([np.isfinite(s.values) for s in series], axis=0)
        shown = [replace(s, values=s.values[timed]) for s in series]
        legend = _legend([(s.color, s.label, "") for s in reversed(series)])
        body = area_chart(run.steps[timed], shown)
        cards.append(_card("Time by stage", "Seconds of each step, stacked.", body, legend))
        total = {s.label: (float(np.nansum(s.values)), s.color) for s in series}
        whole = sum(seconds for seconds, _ in total.values())
        rows = [(name, s, f"{duration(s)} · {s / whole:.0%}", color) for name, (s, color) in total.items()]
        note = f"{duration(whole)} over {steps_text(run.steps_done)}."
        cards.append(_card("In all", note, _bars(sorted(rows, key=lambda row: -row[1]))))
    for title, prefix, color in (("Inside a weight sync", "sync/", 0), ("Inside learning", "learn/", 4)):
        names = [name for name, metric in METRICS.items() if name.startswith(prefix) and metric.unit == "s"]
        means = [(stage(name), float(run.finite(name).mean())) for name in names if len(run.finite(name))]
        if means:
            rows = [(name, mean, duration(mean), color) for name, mean in means]
            cards.append(_card(title, "Mean of a step, in order.", _bars(rows)))
    return _grid(cards)


def _grid(cards: Sequence[str]) -> str:
    return "".join(cards) or '<div class="card"><p class="empty">Nothing was logged yet.</p></div>'


def _bars(rows: Sequence[tuple[str, float, str, int]]) -> str:
    """(label, value, how it reads, colour) -> horizontal bars on one scale."""
    most = max(value for _, value, _, _ in rows) or 1.0
    return (
        '<div class="bars">'
        + "".join(
            f"<span>{escape(label)}</span>"
            f'<span class="bar" style="width:{100 * value / most:.1f}%;background:var(--c{color})"></span>'
            f'<span class="number">{escape(text)}</span>'
            for label, value, text, color in rows
        )
        + "</div>"
    )


def samples(rows: Sequence[Mapping[str, Any]], most: int = 3) -> str:
    """A few responses of the first and of the newest logged step, beside each other."""
    steps = [(step, list(group)[:most]) for step, group in groupby(rows, key=lambda row: row["step"])]
    if not steps:
        return '<div class="card"><p class="empty">No response was kept yet.</p></div>'
    chosen = [steps[0], steps[-1]] if len(steps) > 1 else steps[:1]
    columns = (
        f"<div><h3>{when}: step {step}</h3>{''.join(_sample(row) for row in group)}</div>"
        for when, (step, group) in zip(("Early", "Late"), chosen, strict=False)
    )
    return f'<section class="samples">{"".join(columns)}</section>'


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


SAMPLE_FACTS = (("tokens", " tokens"), ("finish", ""))


def newest(run: RunData) -> str:
    """A table of the newest value of each metric."""
    rows = "".join(
        f'<tr><td>{name}</td><td class="number">{show(name, run.finite(name)[-1])}</td><td>{metric.unit}</td>'
        f"<td>{escape(metric.meaning)}</td></tr>"
        for name, metric in METRICS.items()
        if len(run.finite(name))
    )
    return f'<table class="metrics"><tr><th>metric</th><th>newest</th><th>unit</th><th>meaning</th></tr>{rows}</table>'
