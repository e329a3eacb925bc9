"""The closing lines of a run say what its numbers are numbers of."""

import json
from pathlib import Path

import pytest

from qarl.cli import compose
from qarl.summary import conclude


@pytest.mark.parametrize(("temperature", "drawn"), [(0.0, "greedy"), (0.6, "at temperature 0.6")])
def test_an_accuracy_is_said_with_the_way_it_was_sampled(temperature: float, drawn: str, tmp_path: Path) -> None:
    rows = [{"step": 0, "accuracy/heldout": 0.25}, {"step": 1, "accuracy/heldout": 0.75}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = compose("recipe=quickstart", f"evaluation.temperature={temperature}")
    said = conclude(config, tmp_path, 61.0)
    assert f"held-out accuracy 0.250 -> 0.750 ({drawn}, sampled by vllm at w8a8_int8)" in said
    assert json.loads((tmp_path / "summary.json").read_text())["accuracy_end"] == 0.75


def test_the_time_of_a_resumed_run_is_that_of_all_its_steps(tmp_path: Path) -> None:
    rows = [{"step": step, "time/step_s": 10.0} for step in range(31)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = conclude(compose("recipe=quickstart"), tmp_path, 20.0)
    assert said.splitlines()[-1] == "30 steps in 5 min 10 s; this process took 20 s, start-up included"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["seconds"], summary["process_seconds"]) == (310.0, 20.0)
