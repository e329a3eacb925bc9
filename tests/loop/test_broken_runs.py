"""Runs that are broken on purpose: each is seen at the level it ought to be, and a healthy one under the same limits is not.

Where the weights are wrong the proof of each sync is off (`sync.tiles=0 sync.canaries=0`): on, it ends the run before a token is
written (`tests/rollout/test_pitfalls.py`), and the guard is for what a proof does not see. The limit of the mismatch lies
between a healthy run (3e-4 nats a token, where a code falls to the other side) and a router of four bits (4e-3), the mildest
of these faults.
"""

from pathlib import Path
from typing import Any

import pytest

from qarl import checkpoint, jsonl
from qarl.guard import WATCHES

SCRIPT = str(Path(__file__).with_name("broken_run.py"))
UNPROVED = ("sync.tiles=0", "sync.canaries=0")
LIMITS = ("guard.correct.mismatch=0.002", "guard.correct.timeouts=0.2")
KL = ("guard.correct.kl=0.1", "algorithm.mini_batches=4")
STOPS = (
    "guard.stop.mismatch=0.002",
    "guard.stop.kl=0.1",
    "guard.stop.timeouts=0.2",
    "guard.stop.error_share=0.5",
    "guard.stop.entropy_drift=10",
)
EXPERTS = ("model.pocket.experts=4", "rollout.format=w4a16_g32", "steps=3")

pytestmark = pytest.mark.slow


@pytest.fixture
def broken(runner):
    def run(fault: str, name: str, *overrides: str) -> tuple[Any, list[dict], Path]:
        """What the process came to, its metrics, its folder."""
        done = runner.run(name, "rollout.engine=torch", *overrides, program=(SCRIPT, fault))
        assert "Traceback" not in done.stderr, done.stderr[-3000:]
        folder = runner.out / name
        return done, jsonl.read(folder / "metrics.jsonl"), folder

    return run


def assert_said(done: Any, limit: str, start: str) -> None:
    """With cause and change, right after."""
    after = done.stderr.partition(start)[2].splitlines()
    assert after, f"{start!r} is not in:\n{done.stderr[-3000:]}"
    assert after[1] == f"  Usual cause: {WATCHES[limit].cause}."
    assert after[2] == f"  What to change: {WATCHES[limit].change}."


def assert_stopped(done: Any, folder: Path, step: int) -> None:
    """With a non-zero exit, and the state it happened in and a report on the disk."""
    saved = folder / "diverged" / f"step-{step:06d}"
    assert done.returncode == 1 and done.stderr.count("DivergenceError") == 1
    assert f"The state is saved in {saved}" in done.stderr and checkpoint.find_damage(saved) is None
    assert f"Report: {folder / 'report.html'}" in done.stderr and "</html>" in (folder / "report.html").read_text()


@pytest.mark.parametrize("model", [(), EXPERTS], ids=["dense", "experts"])
def test_a_healthy_run_under_all_these_limits_is_left_alone(broken, model):
    done, rows, folder = broken("none", f"healthy{len(model)}", *UNPROVED, *STOPS, *LIMITS, *KL, *model)
    assert done.returncode == 0 and "guard." not in done.stderr and not (folder / "diverged").exists()
    assert len(rows) > 3
    for row in rows[:-1]:
        assert [row[f"guard/{n}"] for n in ("warnings", "corrections", "left_out", "skipped_updates", "read_back")] == [
            0
        ] * 5


def test_a_stale_engine_is_not_learnt_from_and_named_by_the_sync_that_reads_back(broken):
    done, rows, _ = broken("stale", "stale", *UNPROVED, *LIMITS, "learner.optimizer.lr=3e-3")
    assert_said(done, "mismatch", "step 1: mismatch/mean_abs is ")
    assert [row["guard/skipped_updates"] for row in rows][1:] == [2]
    assert done.returncode == 1
    assert "SyncError: model.layers.0.self_attn.qkv_proj: the engine serves other weights" in done.stderr


def test_a_wrong_scale_stops_the_run_after_patience(broken):
    done, rows, folder = broken("scale", "scale", *UNPROVED, *STOPS, "guard.patience=2")
    assert_stopped(done, folder, 2)
    assert_said(done, "mismatch", "DivergenceError: step 1: mismatch/mean_abs was ")
    assert len(rows) == 2 and all(
        row["mismatch/mean_abs"] > 0.002 and row["guard/skipped_updates"] == 0 for row in rows
    )


def test_a_quantized_router_is_not_learnt_from_and_stops_the_run_after_patience(broken):
    """Its weights are no code, so no tile reads them back: every step says so, until nothing was learnt from three of them."""
    done, rows, folder = broken("router", "router", *UNPROVED, *LIMITS, *EXPERTS)
    assert_stopped(done, folder, 3)
    assert_said(done, "mismatch", "DivergenceError: step 2: mismatch/mean_abs was ")
    assert "guard.correct.mismatch=0.002, and 3 rollouts in a row were not learnt from." in done.stderr
    assert [row["guard/skipped_updates"] for row in rows] == [2, 2, 2]
    assert [row["guard/read_back"] for row in rows] == [0, 1, 1]
    for step in range(3):
        assert_said(done, "mismatch", f"step {step}: mismatch/mean_abs is ")


def test_a_quantized_router_is_refused_by_the_canaries_where_they_are_on(broken):
    done, rows, _ = broken("router", "router_proved", "sync.canary_tolerance=0.002", *EXPERTS)
    assert done.returncode == 1 and rows == []
    assert "SyncError: version 0: on 4 canaries engine and learner differ by " in done.stderr


def test_a_learning_rate_a_hundred_times_too_high_is_corrected_and_stops_the_run(broken):
    """The first update is harmless to measure, the second begins with what it did."""
    done, rows, folder = broken("none", "lr", "learner.optimizer.lr=1e-2", *STOPS, *LIMITS, *KL, "guard.patience=1")
    assert_stopped(done, folder, 1)
    assert_said(done, "kl", "step 0: objective/kl_step is ")
    assert_said(done, "kl", "DivergenceError: step 0: objective/kl_step was ")
    assert len(rows) == 1 and 1 <= rows[0]["guard/skipped_updates"] <= 2, (
        "the first update alone cannot be seen to go too far"
    )


def test_log_probs_that_are_not_numbers_are_warned_of_and_stop_the_run(broken):
    """No limit is given: what cannot be compared must not look like no mismatch at all."""
    done, rows, folder = broken("numbers", "numbers", "guard.patience=2")
    assert_stopped(done, folder, 2)
    assert_said(done, "dropped", "step 0: mismatch/dropped_share is 1, guard.warn.dropped=0")
    assert_said(done, "dropped", "DivergenceError: step 1: mismatch/dropped_share was 1, 1 in 2 steps in a row")
    assert [row["mismatch/mean_abs"] for row in rows] == [0, 0]


def test_rewards_that_time_out_are_left_out_and_not_counted_as_wrong(broken):
    done, rows, _ = broken("timeout", "timeout", *LIMITS, "reward.timeout_s=1", "steps=2", "evaluation.prompts=1")
    assert done.returncode == 0
    assert_said(done, "timeouts", "step 0: reward/timeout_share is ")
    assert all(
        row["guard/left_out"] == row["reward/timeouts"] > 16 * 0.2 and row["reward/timeouts"] < 16 for row in rows[:-1]
    )
    assert all(row["guard/skipped_updates"] == 0 for row in rows[:-1])
