"""One self-contained page about a run: `python -m qarl.report RUN` writes `RUN/report.html`.

It needs what the run left so far (`config.yaml`, `metrics.jsonl`, `samples.jsonl`, `summary.json`; each may be
missing), no network and no scripts. Everything a model or a user wrote is escaped.
"""

from __future__ import annotations

import argparse
import os
from html import escape
from pathlib import Path
from string import Template

from qarl import report_cards as cards
from qarl.jsonl import naming
from qarl.progress import duration
from qarl.run_data import RunData, load

TEMPLATE = Path(__file__).with_name("report.html")


def write_report(run_dir: Path) -> Path:
    """Writes `run_dir/report.html`, of a finished run as of one in progress, and returns its path."""
    run = load(run_dir)
    name = str(run.configured("name") or run_dir.resolve().name)
    page = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"{name} · QaRL"),
        name=escape(name),
        colors=cards.color_rules(),
        status=_status(run),
        what=escape(_what(run)),
        headline=escape(" ".join(headline(run))),
        tiles=cards.tiles(run),
        learning=cards.learning(run),
        mismatch=cards.mismatch(run),
        time=cards.time(run),
        samples=cards.samples(run.samples),
        metrics=cards.newest(run),
        config=escape(run.config_text or "config.yaml is missing"),
    )
    path = run_dir / "report.html"
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
    seconds = run.summary.get("seconds") or run.finite("time/step_s").sum()
    if seconds:
        most_of = max(stages, key=lambda name: stages[name], default="")
        share = stages[most_of] / sum(stages.values()) if most_of else 0.0
        where = f"; the largest stage, {most_of}, had {share:.0%} of the steps' time" if most_of else ""
        sentences.append(f"It took {duration(float(seconds))}{where}.")
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
    if run.summary:
        return '<span class="pill good">finished</span>'
    total = run.configured("steps")
    return (
        f'<span class="pill">not finished: step {run.steps_done}{f" of {escape(str(total))}" if total else ""}</span>'
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m qarl.report", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    run_dir: Path = parser.parse_args().run
    if not run_dir.is_dir():
        parser.error(f"{run_dir}: no such folder")
    print(write_report(run_dir))


if __name__ == "__main__":
    main()
