"""The learner's benchmark, at sizes that measure nothing. Beside the learner's other tests: an engine of vLLM that closes ends
the process group of all."""

import gc
import weakref
from functools import partial

import pytest

from benchmarks import learner
from benchmarks.rows import Report


@pytest.fixture(autouse=True)
def quick_collections():
    """DeepSpeed collects garbage six times a start; what stands already need not be looked through each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("model", learner.MODELS)
def test_every_learner_row_is_measured_against_bf16(run_benchmark, model, monkeypatch):
    monkeypatch.setattr(learner, "FORMATS", ("w4a16",))  # a start of DeepSpeed each
    status, rows = run_benchmark(learner, "--only", model)
    assert status == 0
    runs = ["bf16 none", "bf16 auto", "w4a16 emulated", "bf16 none", "bf16 auto"]
    assert [f"{row['format']} {row['backend']}" for row in rows] == [run for run in runs for _ in (False, True)]
    assert all(row["ops"] == "torch" for row in rows if row["backend"] != "auto")
    for alike in (rows[::2], rows[1::2]):
        none, auto = ((alike[i]["ms"] + alike[i + 3]["ms"]) / 2 for i in (0, 1))
        for row in alike:
            assert row["ms"] >= row["forward_ms"] > 0
            assert row["ratio_transformers"] == pytest.approx(row["ms"] / none)
            assert row["ratio_aligned"] == pytest.approx(row["ms"] / auto)


def test_the_bars_are_over_the_faster_bf16(tmp_path):
    """First and last as transformers computes it 100 and 110 ms, aligned 80 and 90: its mean is 85."""
    report, bar = Report(tmp_path / "r.json"), learner.BARS["w8a8_int8"]
    for format, backend, ms in (
        ("bf16", "none", 100.0),
        ("bf16", "auto", 80.0),
        ("w8a8_int8", "engine", 84.0),
        ("bf16", "none", 110.0),
        ("bf16", "auto", 90.0),
    ):
        row = {"layer": "dense", "format": format, "backend": backend}
        report.add(row, partial(dict, ms=ms), *((bar,) if format != "bf16" else ()))
    learner.compare(report.rows[:4])
    int8 = report.rows[2]
    assert "ratio" not in int8 and int8["bars"] == {bar.what: None}, "a run is missing, which may be of the faster"
    learner.compare(report.rows)
    report.judge()
    assert int8["ratio_transformers"] == pytest.approx(0.8) and int8["ratio_aligned"] == pytest.approx(84 / 85)
    assert (int8["bf16_ms"], int8["ratio"], int8["bars"]) == (85.0, int8["ratio_aligned"], {bar.what: False})
    assert "0.800" in learner.summary(report) and "NOT MET" in learner.summary(report)


def test_a_closed_learner_leaves_nothing_and_trouble_in_closing_costs_no_other_row(run_benchmark, monkeypatch):
    monkeypatch.setattr(learner, "FORMATS", ())
    monkeypatch.setattr(learner, "BF16", {"transformers": "none"})
    closed, left = learner.Lazy.close, []

    def close(started):
        left.append(weakref.ref(started.learner.model.lm_head.weight))
        closed(started)
        raise RuntimeError("out of order")

    monkeypatch.setattr(learner.Lazy, "close", close)
    status, rows = run_benchmark(learner, "--only", "dense")
    assert status == 1 and len(left) == 2
    assert [weight() for weight in left] == [None, None]
    broken = "RuntimeError: out of order"
    assert [row.get("failed") for row in rows] == [None, None, broken, None, None, broken]
