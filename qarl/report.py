"""One self-contained page: `python -m qarl.report RUN` writes `RUN/report.html`; several RUNs are laid over each other.

It needs what the run left so far (`config.yaml`, `metrics.jsonl`, `samples.jsonl`, `summary.json`; each may be
missing), no network and no scripts. Everything a model or a user wrote is escaped.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from qarl import report_cards as cards
from qarl.dashboard import SAMPLES, SECTIONS
from qarl.jsonl import naming
from qarl.progress import duration
from qarl.report_overlay import comparison
from qarl.run_data import RunData, load

TEMPLATE = Path(__file__).with_name("report.html")


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Writes the page about a run, finished or in progress, and returns its path, by default `run_dir/report.html`."""
    run = load(run_dir)
    name = str(run.configured("name") or run_dir.resolve().name)
    body = [
        f'<header><h1>{escape(name)}</h1>{_status(run)}<p class="what">{escape(_what(run))}</p></header>',
        f'<p class="headline">{escape(" ".join(headline(run)))}</p>',
        f'<section class="tiles" aria-label="Key numbers">{cards.tiles(run)}</section>',
        *(cards.section(run, section) for section in SECTIONS),
        f"<h2>{SAMPLES}, early and late</h2>{cards.early_and_late(run.samples)}",
        "<h2>Details</h2>",
        _details("Every metric of the newest step", cards.newest(run)),
        _details("Configuration", f"<pre>{escape(run.config_text or 'config.yaml is missing')}</pre>"),
    ]
    return _write(out or run_dir / "report.html", name, body)


def write_comparison(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Writes one page about several runs and returns its path, by default `report.html` in their common parent.

    `ValueError` where a run is named twice, or where there are more configurations than colours.
    """
    folders = [path.resolve() for path in run_dirs]
    twice = [path for path, folder in zip(run_dirs, folders, strict=True) if folders.count(folder) > 1]
    if twice:
        raise ValueError(f"{twice[0]}: named twice")
    parent = Path(os.path.commonpath([folder.parent for folder in folders]))
    runs = {str(folder.relative_to(parent)): load(folder) for folder in folders}
    return _write(out or parent / "report.html", f"{len(runs)} runs", comparison(runs))


def _details(title: str, body: str) -> str:
    return f'<details class="card"><summary>{title}</summary>{body}</details>'


def _write(path: Path, name: str, body: Sequence[str]) -> Path:
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"{name} · QaRL"), colors=cards.color_rules(), body="\n".join(body)
    )
    partial = path.with_suffix(".partial")
    with naming(path):
        partial.write_bytes(page.encode(errors="replace"))  # a response may hold lone surrogates
        os.replace(partial, path)
    return path


def headline(run: RunData) -> list[str]:
    """What happened, in at most three sentences: accuracy, mismatch, time."""
    if not len(run.steps):
        return ["No step has been finished yet."]
    sentences = [_accuracy_sentence(run)]
    mean, largest = run.finite("mismatch/mean_abs"), run.finite("mismatch/max_abs")
    if len(mean):
        sides = f"The {run.format} sampler" if run.format else "The sampler"
        most = f", {largest.max():.2g} at most" if len(largest) else ""
        sentences.append(f"{sides} and the learner differed by {mean.mean():.2g} nats a token on average{most}.")
    stages = run.stage_seconds()
    seconds = float(run.finite("time/step_s").sum())
    if seconds:
        most_of = max(stages, key=lambda name: stages[name], default="")
        share = stages[most_of] / sum(stages.values()) if most_of else 0.0
        where = f"; the largest stage, {most_of}, had {share:.0%} of that" if most_of else ""
        sentences.append(f"Its steps took {duration(seconds)}{where}.")
    return sentences


def _accuracy_sentence(run: RunData) -> str:
    steps = cards.steps_text(run.steps_done)
    start, end = run.accuracy
    if start is not None and end is not None and run.steps_done:
        change = f"from {start:.1%} to {end:.1%}" if start != end else f"at {end:.1%}"
        verb = "stayed" if start == end else "rose" if end > start else "fell"
        return f"Held-out accuracy {verb} {change} in {steps}."
    reward = run.finite("reward/mean")
    if len(reward):
        return f"Mean reward went from {reward[0]:.3f} to {reward[-1]:.3f} in {steps}."
    known = f"; held-out accuracy is {start:.1%}" if start is not None else ""
    return f"Training is at step {run.steps_done}{known}."


def _what(run: RunData) -> str:
    pocket = "pocket Qwen3" if run.configured("model", "pocket") else ""
    engine, backend, seed = run.summary.get("engine"), run.configured("learner", "backend"), run.configured("seed")
    engine = engine or run.configured("rollout", "engine")
    parts = [
        str(run.configured("model", "path") or run.configured("model", "gguf") or pocket),
        f"{run.format} rollouts by {engine}" if run.format and engine else run.format,
        f"learner backend {backend}" if backend else "",
        f"seed {seed}" if seed is not None else "",
    ]
    return " · ".join(part for part in parts if part)


def _status(run: RunData) -> str:
    total = run.configured("steps")
    # A finished run that is continued to more steps still holds the summary of the first time.
    if run.summary and not (isinstance(total, int) and run.summary.get("steps", total) < total):
        return '<span class="pill good">finished</span>'
    return (
        f'<span class="pill">not finished: step {run.steps_done}{f" of {escape(str(total))}" if total else ""}</span>'
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m qarl.report", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, help="the page; default: report.html in RUN, or in the RUNs' common parent")
    arguments = parser.parse_args()
    for run_dir in arguments.runs:
        if not run_dir.is_dir():
            parser.error(f"{run_dir}: no such folder")
        if not any((run_dir / name).exists() for name in ("config.yaml", "metrics.jsonl")):
            parser.error(f"{run_dir}: no run is there (neither config.yaml nor metrics.jsonl)")
    try:
        if len(arguments.runs) == 1:
            print(write_report(arguments.runs[0], arguments.out))
        else:
            print(write_comparison(arguments.runs, arguments.out))
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
