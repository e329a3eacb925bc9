"""The benchmark of alignment, as the GPU runs it, on narrow models."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import ladder

ROOT = Path(__file__).resolve().parents[2]


def test_the_bar_is_of_the_models_own_bf16_gap():
    from benchmarks.alignment_gpu import judge

    def row(model: str, format: str, **means: float) -> dict:
        return {"model": model, "format": format, "backends": {name: {"mean_abs": m} for name, m in means.items()}}

    rows = [
        row("a", "bf16", none=0.02, auto=0.01),
        row("a", "w4a16", none=0.5, auto=0.029),
        row("a", "w8a8_fp8", auto=0.031),
        row("b", "bf16", none=0.001),
        row("b", "w4a16", auto=0.002),
        row("c", "w4a16", auto=0.1),
        {"model": "a", "format": "w8a8_int8", "error": "killed"},
    ]
    judge(rows)
    assert [r.get("holds") for r in rows] == [None, True, False, None, False, None, None]
    assert rows[1]["bar"] == pytest.approx(0.03) and rows[4]["aligned_over_bf16"] == pytest.approx(2.0)


def test_gaps_and_router_flips_are_counted():
    import torch

    from benchmarks.alignment_job import flips, gap

    found = gap(np.array([0.1, -0.3, 0.0, 0.0], np.float32))
    assert found["mean_abs"] == pytest.approx(0.1) and found["max_abs"] == pytest.approx(0.3)
    assert found["mean"] == pytest.approx(-0.05)
    one = [torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0, 1], [4, 5]])]
    other = [torch.tensor([[0, 1], [2, 4]]), torch.tensor([[0, 1], [4, 5]])]
    assert flips(one, other) == 0.25


@pytest.mark.slow
def test_the_whole_benchmark_runs_on_narrow_models(tmp_path):
    command = [sys.executable, "-m", "benchmarks.alignment", "--tiny", "--parallel", "2", "--work", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {(r["model"], r["format"]): r for r in json.loads((tmp_path / "alignment_tiny.json").read_text())["rows"]}
    assert len(rows) == 4 and not [r["error"] for r in rows.values() if "error" in r]
    for row in rows.values():
        if "refusal" in row:  # int8 experts, on most CPUs
            assert row["format"] != "bf16"
            continue
        assert row["tokens"] > 500 and 0.5 < row["entropy"] < 6
        assert not [result["error"] for result in row["backends"].values() if "error" in result]
        assert row["engine_self"]["mean_abs"] < 1e-5  # on a CPU, decoding sums as prefill does
    dense = rows["qwen3-8b-4l", "bf16"]["backends"], rows["qwen3-8b-4l", "w8a8_int8"].get("backends")
    assert dense[0]["none"]["mean_abs"] < 1e-4 and dense[0]["auto"]["mean_abs"] < 1e-4
    assert dense[1] is None or dense[1]["none"]["mean_abs"] > 1000 * dense[0]["none"]["mean_abs"]


def test_the_ladder_has_a_rung_for_each_learner_that_ran(tmp_path):
    row = {
        "model": "m-4l",
        "format": "w4a16",
        "engine_self": {"mean_abs": 0.0},
        "backends": {
            "none": {"mean_abs": 0.5},
            "emulated": {"mean_abs": 0.1},
            "fused": {"error": "no"},
            "auto": {"mean_abs": 0.25},
        },
    }
    assert ladder.rungs(row) == {"none": 0.5, "auto": 0.25, "engine_self": 0.0}
    ladder.draw([row], tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
