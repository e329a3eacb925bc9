"""The learner's benchmark, at sizes that measure nothing. Beside the learner's other tests: an engine of vLLM that closes ends
the process group of all."""

import gc
import weakref

import pytest

from benchmarks import learner


@pytest.fixture(autouse=True)
def quick_collections():
    """DeepSpeed collects garbage six times a start; what stands already need not be looked through each time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("model", learner.MODELS)
def test_every_learner_row_is_measured_against_bf16(run_benchmark, model, monkeypatch):
    monkeypatch.setattr(learner, "FORMATS", ("bf16", "w4a16"))  # a start of DeepSpeed each
    status, rows = run_benchmark(learner, "--only", model)
    assert status == 0
    assert [row["format"] for row in rows] == ["bf16", "bf16", "w4a16", "w4a16", "bf16"]
    for i, row in enumerate(rows):
        assert row["ms"] >= row["forward_ms"] > 0
        assert row.get("bf16_ms") == [None, None, rows[0]["ms"], rows[1]["ms"], rows[0]["ms"]][i]
        assert i < 2 or row["ratio"] == pytest.approx(row["ms"] / row["bf16_ms"])


def test_a_closed_learner_leaves_nothing_and_trouble_in_closing_costs_no_other_row(run_benchmark, monkeypatch):
    monkeypatch.setattr(learner, "FORMATS", ("bf16",))
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
    assert [row.get("failed") for row in rows] == [None, None, broken, None, broken]
