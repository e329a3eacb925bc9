"""The command line: what it answers without a run, and how it refuses."""

import subprocess
import sys

import pytest

from qarl import jsonl


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "qarl.train", *arguments], capture_output=True, text=True, timeout=60)


def test_cfg_job_prints_every_key_and_runs_nothing(tmp_path):
    done = train("recipe=quickstart", f"out={tmp_path}", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "grad_clip: 1.0" in done.stdout and "format: w8a8_int8" in done.stdout
    assert not list(tmp_path.iterdir())


def test_help_shows_groups_and_keys():
    done = train("--help")
    assert done.returncode == 0, done.stderr
    assert "python -m qarl.train recipe=quickstart" in done.stdout
    assert "recipe: " in done.stdout and "quickstart" in done.stdout and "grad_clip" in done.stdout


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("learner.optimiser.lr=1", "learner.optimiser"),
        ("recipe=quikstart", "did you mean 'quickstart'"),
        ("rollout.format=int3", "rollout.format"),
        ("rollout.engine=sglang", "rollout.engine"),
        ("algorithm.mini_batches=7", "algorithm.mini_batches"),
    ],
)
def test_a_mistake_exits_2_with_one_line(argument, said):
    done = train(*([] if argument.startswith("recipe") else ["recipe=quickstart"]), argument)
    assert done.returncode == 2
    assert said in done.stderr and len(done.stderr.splitlines()) == 1 and done.stderr.startswith("ConfigError: ")
    assert done.stdout == ""


@pytest.mark.slow
def test_multirun_does_one_run_after_another_in_one_process(runner):
    done = runner.run(
        "of-${seed}",
        f"hydra.sweep.dir={runner.out}",
        "seed=1,2",
        "steps=1",
        "model.pocket.steps=0",
        "rollout.engine=torch",
        "--multirun",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (jsonl.read(runner.out / f"of-{seed}" / "metrics.jsonl") for seed in (1, 2))
    assert [row["step"] for row in first] == [row["step"] for row in second] == [0, 1]
    assert first[0]["entropy"] != second[0]["entropy"]
