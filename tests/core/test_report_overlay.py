"""Several runs on one page: what stands in one line, what the band encloses, which keys differ."""

import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from qarl.charts import Series, line_chart
from qarl.dashboard import SECTIONS
from qarl.jsonl import StepLog
from qarl.metrics import METRICS
from qarl.report import write_comparison
from qarl.report_cards import COLORS
from qarl.report_overlay import Group, comparison, differences, grouped, spread
from qarl.run_data import RunData, load


def make_run(folder: Path, config: dict[str, Any] | None, **columns: Sequence[float | None]) -> Path:
    """`reward__mean=[0.5, None]`: a run of two steps, of which the second did not log it."""
    folder.mkdir(parents=True)
    rows = StepLog(folder / "metrics.jsonl")
    for step in range(max((len(values) for values in columns.values()), default=0)):
        row = {name.replace("__", "/"): values[step] for name, values in columns.items() if step < len(values)}
        rows.append(step, {name: value for name, value in row.items() if value is not None})
    rows.close()
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def config(name: str, seed: int, **changes: Any) -> dict[str, Any]:
    """As `qarl.train` writes it, where recipes let other seeds follow."""
    fixed = {"model": {"pocket": {"seed": seed}}, "rollout": {"format": "bf16"}, "logging": {"project": name}}
    return {"name": name, "seed": seed, "steps": 3, **fixed, **changes}


def texts(page: str) -> list[list[str]]:
    """Rows of every table."""
    tree = ElementTree.fromstring(f"<div>{page}</div>")
    return [["".join(cell.itertext()) for cell in row] for row in tree.iter("tr")]


def test_runs_that_differ_in_seeds_and_names_alone_are_one_group(tmp_path: Path):
    made = {
        "a-0": config("a-0", 0),
        "b": config("b", 0, rollout={"format": "w8a8_int8"}),
        "a-1": config("a-1", 1),
        "longer": config("longer", 1, steps=4),
    }
    groups = grouped({name: load(make_run(tmp_path / name, made[name])) for name in made})
    assert [list(group.runs) for group in groups] == [["a-0", "a-1"], ["b"], ["longer"]]
    assert [group.label for group in groups] == ["a (seeds 0, 1)", "b", "longer"]
    assert [group.color for group in groups] == [0, 1, 2]


def test_groups_whose_names_begin_alike_have_labels_of_their_own(tmp_path: Path):
    made = {
        f"run{i}": config(f"run{i}", i % 2, rollout={"format": f})
        for i, f in enumerate(("bf16", "bf16", "w4a16", "w4a16"))
    }
    groups = grouped({name: load(make_run(tmp_path / name, made[name])) for name in made})
    assert [group.label for group in groups] == ["run0 (seeds 0, 1)", "run2 (seeds 0, 1)"]


def test_runs_without_a_configuration_stay_alone(tmp_path: Path):
    groups = grouped({name: load(make_run(tmp_path / name, None)) for name in ("x", "y")})
    assert [list(group.runs) for group in groups] == [["x"], ["y"]]


def test_more_configurations_than_colours_are_refused(tmp_path: Path):
    runs = {str(i): load(make_run(tmp_path / str(i), config("r", 0, steps=i))) for i in range(COLORS + 1)}
    with pytest.raises(ValueError, match=f"{COLORS + 1} configurations in {COLORS + 1} runs; at most {COLORS}"):
        grouped(runs)


def group_of(tmp_path: Path, *entropies: Sequence[float | None]) -> tuple[Group, np.ndarray]:
    runs: dict[str, RunData] = {}
    for i, entropy in enumerate(entropies):
        runs[f"r-{i}"] = load(make_run(tmp_path / f"r-{i}", config("r", i), entropy=entropy))
    return Group(runs, 0), np.arange(max(map(len, entropies)))


def test_the_band_is_from_the_lowest_to_the_highest_seed_around_their_mean(tmp_path: Path):
    group, steps = group_of(tmp_path, [1.0, 2.0], [3.0, 2.0], [8.0, 5.0])
    found = spread(group, steps, ["entropy"])
    assert found is not None
    np.testing.assert_array_equal(np.array(found), [[4.0, 3.0], [1.0, 2.0], [8.0, 5.0]])


def test_the_mean_ends_where_one_seed_does_and_has_a_gap_where_one_is_not_finite(tmp_path: Path):
    group, steps = group_of(tmp_path, [1.0, math.nan, 1.0, 1.0], [3.0, 3.0, math.inf, 3.0], [2.0, 2.0, 2.0])
    for part in spread(group, steps, ["entropy"]) or ():
        assert np.isfinite(part).tolist() == [True, False, False, False]


def test_a_seed_that_never_logged_a_metric_is_not_counted(tmp_path: Path):
    group, steps = group_of(tmp_path, [1.0, 2.0], [None, None])
    found = spread(group, steps, ["entropy"])
    assert found is not None and found[0].tolist() == [1.0, 2.0]
    assert spread(group, steps, ["grad_norm"]) is None


def test_the_sum_of_stages_counts_what_was_not_logged_as_nothing(tmp_path: Path):
    run = load(make_run(tmp_path / "r", config("r", 0), time__learn_s=[1.0, 1.0], time__evaluate_s=[4.0, None]))
    found = spread(Group({"r": run}, 0), run.steps, ["time/learn_s", "time/evaluate_s", "time/log_s"])
    assert found is not None and found[0].tolist() == [5.0, 1.0]


def test_a_band_stands_where_its_numbers_say():
    low, high = np.array([0.0, np.nan, 0.0, 0.5]), np.array([1.0, np.nan, 1.0, 1.0])
    mean = np.array([0.5, np.nan, 0.5, 0.75])
    svg = ElementTree.fromstring(line_chart(np.arange(4), [Series("x", mean, 3, band=(low, high))]))
    (path,) = (p.attrib["d"] for p in svg.iter("path") if p.attrib["class"] == "band c3")
    shapes = [[tuple(map(float, p.split())) for p in shape[:-1].split("L")] for shape in path.split("M")[1:]]
    left, right = shapes
    assert left == [(56.0, 10.0), (56.0, 206.0)], "one step: its height"
    assert [y for _, y in right] == [10.0, 10.0, 108.0, 206.0], "the highest forth, the lowest back"


def test_only_keys_that_differ_are_told(tmp_path: Path):
    made = {"a": config("a", 0), "b": config("b", 1, rollout={"format": "w8a8_int8", "extra": [1]})}
    runs = {name: load(make_run(tmp_path / name, made[name])) for name in made}
    runs["bare"] = load(make_run(tmp_path / "bare", None))
    page = differences(runs)
    assert texts(page) == [
        ["key", "a", "b", "bare"],
        ["logging.project", "a", "b", "–"],
        ["model.pocket.seed", "0", "1", "–"],
        ["rollout.format", "bf16", "w8a8_int8", "–"],
        ["seed", "0", "1", "–"],
        ["rollout.extra", "–", "[1]", "–"],
    ]
    assert "config.yaml is missing: bare" in page


def test_final_numbers_are_means_over_the_seeds_with_their_range(tmp_path: Path):
    a = make_run(tmp_path / "a-0", config("a-0", 0), reward__mean=[0.0] + [0.5] * 10, accuracy__heldout=[0.1, 0.3])
    b = make_run(tmp_path / "a-1", config("a-1", 1), reward__mean=[0.7, 0.7])
    c = make_run(tmp_path / "c", config("c", 0, steps=9), reward__mean=[1.0])
    page = write_comparison([a, b, c]).read_text()
    head, seeds, alone = texts("".join(comparison({p.name: load(p) for p in (a, b, c)})))[:3]
    assert dict(zip(head, seeds, strict=True)) | {"run": "a (seeds 0, 1)", "went": "2 to 11 steps"} == {
        "run": "a (seeds 0, 1)",
        "went": "2 to 11 steps",
        "held-out accuracy, start": "10.0% (10.0% … 10.0%, 1 missing)",
        "held-out accuracy, end": "30.0% (30.0% … 30.0%, 1 missing)",
        "reward, last 10 steps": "0.600 (0.500 … 0.700)",
        "mismatch, nats a token": "–",
        "tokens/s, median": "–",
        "seconds a step, median": "–",
    }
    assert alone[:2] == ["c", "1 step"] and alone[4] == "1.000"
    assert "0.600 (0.500 … 0.700)" in page


def test_every_panel_shows_every_run_and_nothing_is_loaded_or_run(tmp_path: Path):
    logged: dict[str, Sequence[float | None]] = {name.replace("/", "__"): [0.25, 0.5] for name in METRICS}
    made = [make_run(tmp_path / n, config(n, 0, steps=i, evil="<script>"), **logged) for i, n in enumerate("ab")]
    path = write_comparison(made)
    assert path == tmp_path / "report.html"
    text = path.read_text()
    assert "<script" not in text and "http" not in text.replace("http-equiv", "")
    tree = ElementTree.fromstring(f"<div>{text[text.index('<header>') : text.index('<footer>')]}</div>")
    cards = [card for card in tree.iter("article") if card.attrib["class"] == "card"]
    charts = [chart for section in SECTIONS for chart in section.charts]
    assert [card.findtext("h3") for card in cards] == [chart.title for chart in charts]
    for card, chart in zip(cards, charts, strict=True):
        (svg,) = (s for s in card.iter("svg") if s.attrib.get("role") == "img")
        lines = ["all stages"] if chart.stacked else [line.label for line in chart.lines]
        assert svg.attrib["aria-label"] == ", ".join(f"{run}: {line}" for line in lines for run in "ab")
        css = {e.attrib["class"] for e in svg.iter("path") if e.attrib["class"].startswith("line")}
        assert {f"line c{run} d{dash}" for run in (0, 1) for dash in range(len(lines))} == css


def test_the_command_lays_runs_over_each_other_and_names_what_is_wrong(tmp_path: Path):
    a = make_run(tmp_path / "sweep" / "a", config("a", 0), entropy=[1.0, 2.0, 3.0])
    b = make_run(tmp_path / "sweep" / "deep" / "b", config("b", 0, steps=9), grad_norm=[1.0])
    empty = make_run(tmp_path / "sweep" / "empty", None)
    command = [sys.executable, "-m", "qarl.report"]

    def report(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=60)

    done = report(a, b, empty)
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "sweep" / "report.html")
    assert "deep/b" in (tmp_path / "sweep" / "report.html").read_text()
    out = tmp_path / "mine.html"
    assert report(a, b, "--out", out).stdout.strip() == str(out) and out.exists()
    assert report(a, "--out", out).stdout.strip() == str(out) and not (a / "report.html").exists()
    twice = report(a, b, a)
    assert twice.returncode == 2 and f"{a}: named twice" in twice.stderr
    shutil.rmtree(b)
    assert "no such folder" in report(a, b).stderr
