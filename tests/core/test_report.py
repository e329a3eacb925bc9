"""The report, parsed: what it says, that it escapes, and that no state of a run breaks it."""

import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from qarl.charts import BUCKETS, EMPTY, Series, area_chart, line_chart, tick_label, tick_labels
from qarl.dashboard import SECTIONS
from qarl.jsonl import StepLog
from qarl.metrics import METRICS
from qarl.report import headline, write_report
from qarl.report_cards import COLORS, DASHES
from qarl.run_data import load

VOID = {"meta", "link", "br", "img", "hr", "input"}
HOSTILE = "<script>alert(1)</script>\"'&amp; </div> lone \ud800"


class Page(HTMLParser):
    """Tags seen, texts by the class of their element, and whether every tag was closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append((tag, dict(attrs).get("class") or tag))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag, tag

    def handle_data(self, data: str) -> None:
        if self._open and data.strip():
            self.texts.append((self._open[-1][1], data.strip()))

    def of(self, css: str) -> list[str]:
        return [text for kind, text in self.texts if kind == css]


def make_run(run_dir: Path, steps: int, finished: bool = True, response: str = "Answer: 53", bad: int = -1) -> Path:
    """A run that logged every metric there is; step `bad` logged NaN everywhere."""
    run_dir.mkdir(exist_ok=True)
    rows, samples = StepLog(run_dir / "metrics.jsonl"), StepLog(run_dir / "samples.jsonl")
    for step in range(steps):
        values = {name: math.nan if step == bad else 0.25 + step / steps / 2 for name in METRICS}
        if step % 10:
            del values["accuracy/heldout"]
        rows.append(step, values)
        about = {"prompt": f"prompt of {step} {response}", "response": f"response of {step} {response}"}
        samples.append(step, about | {"answer": response, "reward": float(step > 0), "tokens": 7, "finish": "stop"})
    if finished:
        rows.append(steps, {"accuracy/heldout": 0.617})
        summary = {
            "accuracy_start": 0.125,
            "accuracy_end": 0.617,
            "steps": steps,
            "engine": "vllm",
            "format": "w8a8_int8",
        }
        (run_dir / "summary.json").write_text(json.dumps(summary))
    rows.close()
    samples.close()
    config = {"name": "tiny", "steps": steps, "rollout": {"format": "w8a8_int8", "engine": "vllm"}, "seed": 3}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    return run_dir


def page_of(run_dir: Path) -> Page:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_a_finished_run_is_told_in_three_sentences_tiles_and_charts(tmp_path: Path):
    page = page_of(make_run(tmp_path / "r", 60))
    (told,) = page.of("headline")
    assert told.startswith("Held-out accuracy rose from 12.5% to 61.7% in 60 steps.")
    assert "The w8a8_int8 sampler and the learner differed by 0.5 nats a token on average" in told
    assert "Its steps took 30 s; the largest stage, " in told
    assert headline(load(tmp_path / "r")) == [s + "." for s in told.rstrip(".").split(". ")]
    assert page.of("pill good")[0] == "finished"
    assert "61.7%" in page.of("value")
    assert page.of("what") == ["w8a8_int8 rollouts by vllm · seed 3"]
    charts = [chart.title for section in SECTIONS for chart in section.charts]
    assert page.of("h3") == [*charts, "Early: step 0", "Late: step 59"]
    assert page.tags.count("svg") == len(charts)
    assert page.of("h2") == [*(section.title for section in SECTIONS), "Responses, early and late", "Details"]
    assert "format: w8a8_int8" in " ".join(page.of("pre"))


def test_a_finished_run_that_is_continued_to_more_steps_is_not_finished(tmp_path: Path):
    run_dir = make_run(tmp_path / "r", 12)
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config | {"steps": 20}))
    (run_dir / "summary.json").write_text(
        json.dumps(json.loads((run_dir / "summary.json").read_text()) | {"steps": 12})
    )
    assert page_of(run_dir).of("pill")[0] == "not finished: step 12 of 20"


def test_a_summary_that_lies_behind_the_rows_is_not_told(tmp_path: Path):
    """Continued from step 12 to 20, and not there yet."""
    run_dir = make_run(tmp_path / "r", 12)
    (run_dir / "metrics.jsonl").unlink()
    make_run(run_dir, 18, finished=False)
    run = load(run_dir)
    assert not run.summary and run.accuracy == (0.25, 0.25 + 10 / 18 / 2)
    assert page_of(run_dir).of("pill")[0].startswith("not finished: step 18")


@pytest.mark.parametrize(("file", "text"), [("summary.json", "{"), ("config.yaml", "a: [1")])
def test_a_file_that_cannot_be_read_is_named_with_its_folder(file: str, text: str, tmp_path: Path):
    run_dir = make_run(tmp_path / "r", 2)
    (run_dir / file).write_text(text)
    with pytest.raises(ValueError, match=r"/r: config.yaml or summary.json cannot be read"):
        load(run_dir)


def test_every_metric_of_the_run_stands_in_the_table_with_its_unit(tmp_path: Path):
    page = page_of(make_run(tmp_path / "r", 3))
    cells = page.of("td")
    assert cells == [cell for name, metric in METRICS.items() for cell in (name, metric.unit, metric.meaning)]


def test_what_models_and_users_wrote_is_escaped_and_nothing_is_loaded(tmp_path: Path):
    run_dir = make_run(tmp_path / "r", 2, response=HOSTILE)
    (run_dir / "config.yaml").write_text(yaml.safe_dump({"name": "</title><script>x</script>", "seed": "<b>"}))
    page = page_of(run_dir)
    shown = HOSTILE.replace("\ud800", "?")
    assert f"response of 1 {shown}" in page.of("text response")
    assert f"prompt of 0 {shown}" in page.of("prompt text")
    assert page.of("h1") == ["</title><script>x</script>"]
    assert not {"script", "img", "link", "iframe"} & set(page.tags)
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "http://" not in text and "https://" not in text and "<script" not in text
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]


def test_a_run_without_any_step_and_one_without_any_file(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("name: fresh\nsteps: 100\n")
    page = page_of(tmp_path)
    assert page.of("headline") == ["No step has been finished yet."]
    assert page.of("pill") == ["not finished: step 0 of 100"]
    assert page.of("empty") == ["Nothing was logged yet."] * len(SECTIONS) + ["No response was kept yet."]
    bare = tmp_path / "bare"
    bare.mkdir()
    assert page_of(bare).of("h1") == ["bare"]


def test_a_run_in_progress_with_a_torn_line_counts_what_is_whole(tmp_path: Path):
    run_dir = make_run(tmp_path / "r", 12, finished=False)
    with open(run_dir / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 12, "reward/me')
    page = page_of(run_dir)
    assert page.of("pill")[0] == "not finished: step 12 of 12"
    assert page.of("headline")[0].startswith("Held-out accuracy rose from 25.0% to 66.7% in 12 steps.")


def test_nan_leaves_a_gap_and_is_counted(tmp_path: Path):
    page = page_of(make_run(tmp_path / "r", 30, bad=7))
    assert "(1 step not finite)" in " ".join(page.of("b"))
    values = np.array([1.0, 2.0, np.nan, 3.0, 4.0, np.nan, 5.0])
    svg = ElementTree.fromstring(line_chart(np.arange(7), [Series("x", values, 0)]))
    (path,) = (p.attrib["d"] for p in svg.iter("path"))
    assert path.count("M") == 2 and path.count("L") == 2
    assert len(list(svg.iter("circle"))) == 1, "a lonely value is a dot"


def test_a_run_of_nan_alone_makes_a_report(tmp_path: Path):
    page = page_of(make_run(tmp_path / "r", 1, finished=False, bad=0))
    assert page.of("headline")
    assert page.of("empty")


def test_thousands_of_steps_stay_a_small_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.fsync", lambda fd: None)
    path = write_report(make_run(tmp_path / "r", 5000))
    assert path.stat().st_size < 2_000_000
    assert "in 5000 steps" in path.read_text(encoding="utf-8")


def test_a_line_stands_where_its_numbers_say():
    steps, values = np.array([0, 5, 10]), np.array([0.0, 1.0, 0.5])
    svg = ElementTree.fromstring(line_chart(steps, [Series("x", values, 0)]))
    (path,) = (p.attrib["d"] for p in svg.iter("path"))
    points = [tuple(map(float, point.split())) for point in path[1:].split("L")]
    assert points == [(56.0, 206.0), (302.0, 10.0), (548.0, 108.0)]


def test_on_a_log_axis_equal_factors_are_equal_distances_and_zeros_are_gaps():
    values = np.array([0.001, 0.01, 0.1, 0.0, 0.01])
    svg = ElementTree.fromstring(line_chart(np.arange(5), [Series("x", values, 0)], log=True))
    (path,) = (p.attrib["d"] for p in svg.iter("path"))
    heights = [float(point.split()[1]) for point in path[1:].split("L")]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2])
    assert len(heights) == 3
    assert line_chart(np.arange(2), [Series("x", np.zeros(2), 0)], log=True) == EMPTY


def test_combining_steps_keeps_the_maximum_where_asked_and_the_mean_elsewhere():
    values = np.zeros(4 * BUCKETS)
    values[100] = 1.0
    steps = np.arange(len(values))
    peak = line_chart(steps, [Series("x", values, 0, combine="max")])
    mean = line_chart(steps, [Series("x", values, 0)])
    assert "x 1<" in peak and "x 0.25<" in mean and "x 1<" not in mean


def test_areas_stack_to_the_sum():
    steps, one = np.arange(4), np.ones(4)
    svg = ElementTree.fromstring(area_chart(steps, [Series("a", one, 0), Series("b", 3 * one, 1)]))
    tops = [float(p.attrib["d"][1:].split("L")[0].split()[1]) for p in svg.iter("path")]
    axis = {t.text: float(t.attrib["y"]) - 4 for t in svg.iter("text") if t.attrib["text-anchor"] == "end"}
    assert tops == pytest.approx([axis["1"], axis["4"]], abs=0.2)


@pytest.mark.parametrize(
    "low_high", [(0.0, 0.0), (1.0, 1.0), (-3.0, -3.0), (1e-12, 1e12), (-1e-9, 1e-9), (0.0, 5e-324), (1 - 2**-53, 1.0)]
)
def test_no_range_of_values_breaks_an_axis(low_high: tuple[float, float]):
    for log in (False, True):
        ElementTree.fromstring(line_chart(np.arange(2), [Series("x", np.array(low_high), 0)], log=log))


@pytest.mark.parametrize(
    ("value", "percent", "text"),
    [(0.2, True, "20%"), (0.05, False, "0.05"), (15000, False, "15k"), (1e-4, False, "1e-4"), (0, False, "0")],
)
def test_tick_labels(value: float, percent: bool, text: str):
    assert tick_label(value, percent) == text


@pytest.mark.parametrize("ticks", [[1 - 2e-9, 1 - 1e-9, 1.0], [1e-4, 1.5e-4, 2e-4], [10_000_001, 10_000_002]])
@pytest.mark.parametrize("percent", [False, True])
def test_ticks_that_differ_have_labels_that_do(ticks: list[float], percent: bool):
    assert len(set(tick_labels(ticks, percent))) == len(ticks)


def test_a_stack_tells_the_mean_of_a_step_and_the_share_of_each_part(tmp_path: Path):
    rows = StepLog(tmp_path / "metrics.jsonl")
    for step, (forward, backward) in enumerate([(1.0, 2.0), (3.0, 14.0)]):
        rows.append(step, {"reward/mean": 0.0, "learn/forward_s": forward, "learn/backward_s": backward})
    rows.close()
    page = page_of(tmp_path)
    assert page.of("b")[-2:] == ["8.0 s · 80%", "2.0 s · 20%"], "backward on top of forward"
    assert any("In all 20 s" in note for note in page.of("note"))


def test_every_stage_has_its_own_colour(tmp_path: Path):
    page = page_of(make_run(tmp_path / "r", 3))
    areas = [value for name, value in page.attributes if name == "class" and value and value.startswith("area")]
    stacks = [chart for section in SECTIONS for chart in section.charts if chart.stacked]
    assert areas == [f"area c{i}" for chart in stacks for i in range(len(chart.lines))]
    text = (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    assert all(text.count(f"--c{i}:") == 2 for i in range(COLORS)), "defined for light and for dark"
    assert all(text.count(f".d{i} {{") == 1 for i in range(1, DASHES))


def test_the_command_writes_the_report_and_refuses_a_folder_that_is_not_there(tmp_path: Path):
    make_run(tmp_path / "r", 2)
    command = [sys.executable, "-m", "qarl.report"]
    done = subprocess.run([*command, str(tmp_path / "r")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "r" / "report.html")
    missing = subprocess.run([*command, str(tmp_path / "no")], capture_output=True, text=True, timeout=60)
    assert missing.returncode == 2 and "no such folder" in missing.stderr
    of_runs = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert of_runs.returncode == 2 and f"{tmp_path}: no run is there" in of_runs.stderr
    assert not (tmp_path / "report.html").exists()
