"""Whole runs through the command line, small, on real parts: vLLM at INT8, DeepSpeed, Ray."""

import json
import math
from pathlib import Path

import pytest

from qarl import checkpoint, jsonl
from qarl.dashboard import SECTIONS
from qarl.metrics import METRICS
from qarl.rundir import load_config

#: What a step measures of the machine, not of the run.
STAGES = ("gather", "quantize", "pack", "transfer", "wait", "wake", "load", "canary_", "verify", "total")
OF_THE_MACHINE = ("time/", "learn/", "tokens_per_s", *(f"sync/{stage}" for stage in STAGES))

#: Metrics of error responses: a step without any does not write them.
ERRORS = ("ratio", "negative", "clip_positive_high", "clip_negative_low", "clip_negative_high")
CONDITIONAL = {f"error_tokens/{name}" for name in ERRORS}


def rows(folder: Path) -> list[dict]:
    """The run's metrics, without those of the machine."""
    found = jsonl.read(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(OF_THE_MACHINE)} for row in found]


@pytest.fixture(scope="module")
def whole(runner) -> Path:
    """Folder of a finished run; what it printed stands beside."""
    done = runner.run("whole")
    assert done.returncode == 0, done.stderr[-3000:]
    folder = runner.out / "whole"
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder


def test_a_run_leaves_what_it_promises(whole):
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["engine"] == "vllm" and summary["format"] == "w8a8_int8"
    assert {"accuracy_start", "accuracy_end", "mismatch_mean_abs", "seconds"} <= summary.keys()
    assert load_config(whole).algorithm.prompts == 4
    assert "</html>" in (whole / "report.html").read_text()
    assert [row["step"] for row in rows(whole)] == [0, 1, 2, 3, 4]
    closing = (whole / "stdout").read_text().splitlines()
    assert closing[0] == f"report: {whole / 'report.html'}" and len(closing) == 4
    assert "linear weights quantized" in (whole / "stderr").read_text()


def test_the_run_writes_every_metric_the_panels_draw(whole):
    """A chart of a metric that no run writes would stay empty for ever."""
    written = {name for row in jsonl.read(whole / "metrics.jsonl") for name in row}
    drawn = {name for section in SECTIONS for chart in section.charts for name in chart.metrics}
    assert drawn - written <= CONDITIONAL
    assert written <= set(METRICS) | {"step"}


def test_the_run_learns_with_what_the_engine_sampled(whole):
    """INT8 codes and products are the engine's own, so what is left is float32 summation order: 1e-6 nats at this size. A
    learner that computes in floats is three orders of magnitude away (see `benchmarks.alignment`)."""
    trained = rows(whole)[:4]
    assert all(row["mismatch/mean_abs"] < 1e-3 for row in trained)
    assert all(math.isfinite(row["grad_norm"]) for row in trained)
    assert sum(row["grad_norm"] > 0 for row in trained) >= 2, (
        "nothing to learn from: the tests on resuming would be empty"
    )


def test_the_policy_of_a_checkpoint_is_a_hugging_face_folder(whole):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = checkpoint.newest(whole / "checkpoints")
    assert found is not None and found.step == 4
    model = AutoModelForCausalLM.from_pretrained(found.folder / "policy")
    assert model.config.model_type == "qwen3"
    assert AutoTokenizer.from_pretrained(found.folder / "policy").chat_template
    assert not [f for f in found.folder.rglob("*") if f.suffix in (".pt", ".bin", ".pkl", ".pth")]


def test_a_run_that_is_killed_twice_continues_with_the_same_metrics(runner, whole):
    """SIGKILL of the driver alone before the first checkpoint, then of the whole process group in the middle of step 3; each
    time the same command with resume=auto. No process of the dead run outlives it."""
    folder = runner.out / "killed"
    logged = lambda: jsonl.read(folder / "metrics.jsonl")  # noqa: E731

    process = runner.start("killed", "resume=auto")
    runner.kill_once(process, lambda: len(logged()) == 1, group=False)
    assert checkpoint.newest(folder / "checkpoints") is None
    assert runner.left_over("killed", patience=15) == []

    process = runner.start("killed", "resume=auto")
    runner.kill_once(process, lambda: len(logged()) == 3, group=True)
    assert runner.left_over("killed", patience=15) == []

    done = runner.run("killed", "resume=auto")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed from" in done.stderr and "step-000002" in done.stderr
    assert rows(folder) == rows(whole)


def evaluate(runner, policy: Path, name: str, n: int, *overrides: str) -> dict:
    done = runner.run(
        name,
        "model=folder",
        f"model.path={policy}",
        "model.dtype=float32",
        "model.max_tokens=512",
        f"evaluation.n={n}",
        *overrides,
        program=("-m", "qarl.evaluate"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (runner.out / name).glob("evaluation_reasoning_gym_chain_sum_w8a8_int8_*.json")
    record = json.loads(file.read_text())
    assert record["prompts"] == 8 and record["n"] == n and record["model"] == str(policy)
    assert record["scores"].keys() == {"reward", f"mean@{n}", *(f"pass@{k}" for k in range(1, n + 1))}
    assert all(0 <= row["low"] <= row["mean"] <= row["high"] <= 1 for row in record["scores"].values())
    for score in record["scores"]:
        assert score in done.stdout
    return record


def test_evaluate_scores_the_policy_as_the_run_did(runner, whole):
    """Greedy, the same prompts, the same engine: exactly the accuracy that the run ended with."""
    record = evaluate(runner, whole / "checkpoints" / "step-000004" / "policy", "greedy", 1)
    accuracy = json.loads((whole / "summary.json").read_text())["accuracy_end"]
    assert record["engine"] == "vllm" and record["temperature"] == 0
    assert [row["mean"] for name, row in record["scores"].items() if name != "reward"] == [accuracy] * 2


@pytest.mark.slow
def test_evaluate_draws_several_completions_of_a_prompt(runner, whole):
    policy = whole / "checkpoints" / "step-000004" / "policy"
    scores = evaluate(runner, policy, "drawn", 2, "evaluation.temperature=1")["scores"]
    assert scores["mean@2"]["mean"] == scores["pass@1"]["mean"] < scores["pass@2"]["mean"]


def test_a_gradient_that_is_not_finite_stops_the_run_with_its_state_saved(runner):
    script = str(Path(__file__).with_name("poisoned_run.py"))
    done = runner.run("poisoned", "rollout.engine=torch", program=(script,))
    folder = runner.out / "poisoned"
    assert done.returncode == 1, done.stderr[-3000:]
    assert "DivergenceError" in done.stderr and "Traceback" not in done.stderr
    said = done.stderr.splitlines()[-1]
    assert str(folder / "diverged" / "step-000002") in said
    assert f"resume=auto continues from {folder / 'checkpoints' / 'step-000002'}" in said
    assert checkpoint.find_damage(folder / "diverged" / "step-000002") is None
    assert [row["step"] for row in rows(folder)] == [0, 1, 2], "the step that broke is the one to look at"
