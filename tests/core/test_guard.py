"""What the guard warns of, corrects and stops, when it does not, and whether its messages help."""

import json
import math
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qarl.build import build, check_keys
from qarl.config import AlgorithmConfig, CorrectLimits, GuardConfig, Limits, RunConfig
from qarl.errors import DivergenceError
from qarl.guard import LEAST_ENTROPY, WATCHES, Guard
from qarl.loop import learn
from qarl.metrics import METRICS
from qarl.objectives import SUMS
from qarl.records import Completion, Sample, UpdateStats

FINE = {
    "mismatch/mean_abs": 0.01,
    "mismatch/ess_token": 0.99,
    "objective/kl_step": 1e-4,
    "grad_norm": 1.0,
    "entropy": 0.5,
    "error_tokens/share": 0.0,
    "mismatch/dropped_share": 0.0,
    "reward/timeouts": 0.0,
    "reward/timeout_share": 0.0,
}
#: limit -> its metric, a value on it, a value beyond it
EDGES = {
    "mismatch": ("mismatch/mean_abs", 0.3, 0.31),
    "ess": ("mismatch/ess_token", 0.3, 0.29),
    "kl": ("objective/kl_step", 0.3, 0.31),
    "grad_norm": ("grad_norm", 0.3, 0.31),
    "error_share": ("error_tokens/share", 0.3, 0.31),
    "dropped": ("mismatch/dropped_share", 0.3, 0.31),
    "timeouts": ("reward/timeout_share", 0.3, 0.31),
}


def guard(said: list[str] | None = None, patience: int = 3, **levels: dict[str, float]) -> Guard:
    """One with these limits and no others."""
    off: dict[str, dict[str, Any]] = {
        level: {f.name: None for f in fields(cls)}
        for level, cls in (("warn", Limits), ("correct", CorrectLimits), ("stop", Limits))
    }
    config = build(GuardConfig, {"patience": patience, **{level: off[level] | levels.get(level, {}) for level in off}})
    return Guard(config, said.append if said is not None else lambda text: None)


def step_of(watcher: Guard, step: int, **changed: float) -> dict[str, float]:
    """A whole step as the loop asks, with `FINE` metrics but for these limits' ones."""
    row = FINE | {EDGES[name][0]: value for name, value in changed.items()}
    watcher.leaves_out_timeouts(step, row)
    watcher.trusts(step, row)
    watcher.goes_on(step, update(row["objective/kl_step"], row["grad_norm"]))
    own = watcher.look(step, row)
    watcher.enforce()
    return own


def update(kl: float, grad_norm: float) -> UpdateStats:
    sums = dict.fromkeys(SUMS, 0.0) | {"tokens": 10.0, "kl_step": 10 * kl}
    return UpdateStats(sums, grad_norm, 1e-3, {})


@pytest.mark.parametrize("name", EDGES)
def test_it_stops_after_patience_steps_in_a_row_and_says_what_why_and_what_to_change(name):
    metric, on, beyond = EDGES[name]
    watcher = guard(stop={name: 0.3}, patience=3)
    step_of(watcher, 0, **{name: beyond})
    step_of(watcher, 1, **{name: beyond})
    step_of(watcher, 2, **{name: on})  # on the limit is not beyond it: the row ends
    step_of(watcher, 3, **{name: beyond})
    step_of(watcher, 4, **{name: beyond})
    with pytest.raises(DivergenceError) as stopped:
        step_of(watcher, 5, **{name: beyond})
    seen = ", ".join([f"{beyond:g}"] * 3)
    what, cause, change = str(stopped.value).splitlines()
    assert what == f"step 5: {metric} was {seen} in 3 steps in a row, guard.stop.{name}=0.3."
    assert cause == f"  Usual cause: {WATCHES[name].cause}." and change == f"  What to change: {WATCHES[name].change}."


def test_a_step_without_the_metric_does_not_interrupt_the_row():
    watcher = guard(stop={"grad_norm": 10.0}, patience=2)
    step_of(watcher, 0, grad_norm=11)
    watcher.look(1, {"mismatch/mean_abs": 0.01})
    watcher.enforce()
    with pytest.raises(DivergenceError, match="grad_norm was 11, 12 in 2 steps"):
        step_of(watcher, 2, grad_norm=12)


@pytest.mark.parametrize("metric", [watch.metric for name, watch in WATCHES.items() if name != "entropy_drift"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_stops_at_once_whatever_the_limits(metric, value):
    watcher = guard(patience=100)
    watcher.look(7, FINE | {metric: value})
    with pytest.raises(DivergenceError, match=f"step 7: {metric} is {value}"):
        watcher.enforce()


@pytest.mark.parametrize("name", EDGES)
def test_a_warning_is_said_once_a_row_and_counted_every_step(name):
    metric, on, beyond = EDGES[name]
    said: list[str] = []
    watcher = guard(said, warn={name: 0.3})
    counted = [
        step_of(watcher, step, **{name: value})["guard/warnings"]
        for step, value in enumerate([on, beyond, beyond, on, beyond])
    ]
    assert counted == [0, 1, 1, 0, 1]
    assert [text.splitlines()[0] for text in said] == [
        f"step {step}: {metric} is {beyond:g}, guard.warn.{name}=0.3." for step in (1, 4)
    ]
    assert all(WATCHES[name].cause in text and WATCHES[name].change in text for text in said)


def test_a_step_without_the_metric_warns_of_nothing_and_does_not_interrupt_a_row_of_warnings():
    said: list[str] = []
    watcher = guard(said, warn={"grad_norm": 10.0})
    rows = [FINE | {"grad_norm": 11.0}, {"mismatch/mean_abs": 0.1}, FINE | {"grad_norm": 12.0}]
    assert [watcher.look(step, row)["guard/warnings"] for step, row in enumerate(rows)] == [1, 0, 1]
    assert len(said) == 1


@pytest.mark.parametrize("name", ["mismatch", "ess"])
def test_a_rollout_beyond_the_mismatch_is_not_trusted_and_the_next_sync_reads_back(name):
    metric, on, beyond = EDGES[name]
    said: list[str] = []
    watcher = guard(said, correct={name: 0.3}, warn={name: 0.3})
    assert watcher.trusts(0, FINE | {metric: on}) and not watcher.reads_back and not said
    assert not watcher.trusts(1, FINE | {metric: beyond}) and watcher.reads_back
    assert watcher.look(1, FINE | {metric: beyond})["guard/corrections"] == 1
    assert len(said) == 1, "what was corrected is not warned of as well"
    assert f"step 1: {metric} is {beyond:g}, guard.correct.{name}=0.3: this rollout is not learnt from" in said[0]
    assert WATCHES[name].cause in said[0] and WATCHES[name].change in said[0]
    assert watcher.trusts(2, FINE) and not watcher.reads_back
    assert watcher.look(2, FINE)["guard/corrections"] == 0


@pytest.mark.parametrize("name", ["kl", "grad_norm"])
def test_mini_batches_after_an_update_beyond_its_limit_are_skipped(name):
    _, on, beyond = EDGES[name]
    said: list[str] = []
    watcher = guard(said, correct={name: 0.3})
    values = {"kl": 0.0, "grad_norm": 0.0}
    assert watcher.goes_on(0, update(**values | {name: on})) and not said
    assert not watcher.goes_on(0, update(**values | {name: beyond}))
    assert f"is {beyond:g}, guard.correct.{name}=0.3: the mini-batches that are left" in said[0]


@pytest.mark.parametrize("norms, updates, corrections", [([0.1, 0.4, 0.1], 2, 1), ([0.1, 0.1, 0.4], 3, 0)])
def test_a_correction_is_counted_where_it_skips_a_mini_batch(norms, updates, corrections):
    """After the last one nothing is left to skip, and nothing is said to be."""
    said: list[str] = []
    watcher, left = guard(said, correct={"grad_norm": 0.3}), iter(norms)
    learner: Any = SimpleNamespace(ranks=1, tokens=10, update=lambda part: update(0.0, next(left)))
    one = np.zeros(1, np.float32)
    completion = Completion(0, 0, one.astype(np.int32), one, "", "stop", 0)
    samples = [Sample(completion, one.astype(np.int32), 0.0, 0.0, old_logprobs=one)] * 6
    config = RunConfig(algorithm=AlgorithmConfig(prompts=3, group=2, mini_batches=3))
    assert len(learn(config, learner, samples, watcher, 0)) == updates
    assert len(said) == corrections and watcher.look(0, FINE)["guard/corrections"] == corrections


def test_timeouts_beyond_their_limit_are_left_out():
    said: list[str] = []
    watcher = guard(said, correct={"timeouts": 0.25})
    row = FINE | {"reward/timeouts": 4.0, "reward/timeout_share": 0.25}
    assert not watcher.leaves_out_timeouts(0, row) and watcher.look(0, row)["guard/left_out"] == 0
    row |= {"reward/timeouts": 5.0, "reward/timeout_share": 0.3125}
    assert watcher.leaves_out_timeouts(1, row) and watcher.look(1, row)["guard/left_out"] == 5
    assert "raise reward.timeout_s" in said[0]


def test_a_rollout_whose_every_response_timed_out_is_not_learnt_from():
    watcher = guard(correct={"timeouts": 0.25})
    for share, learnt in ((0.9375, True), (1.0, False)):
        row = FINE | {"reward/timeouts": 16 * share, "reward/timeout_share": share}
        assert watcher.leaves_out_timeouts(0, row)
        assert watcher.trusts(0, row) is learnt and not watcher.reads_back
        watcher.look(0, row)
    counted = (
        guard()
    )  # where they count as wrong, they say as little as any group of equal rewards, and no rule is broken
    assert not counted.leaves_out_timeouts(0, row) and counted.trusts(0, row)


def test_a_run_that_learns_from_no_rollout_stops_after_patience():
    """Whatever corrects, and without any limit of `stop`."""
    watcher = guard(correct={"mismatch": 0.3, "ess": 0.3, "timeouts": 0.3}, patience=3)
    step_of(watcher, 0, mismatch=0.4)
    step_of(watcher, 1, ess=0.2)
    step_of(watcher, 2)  # learnt from: the row ends
    step_of(watcher, 3, timeouts=1.0)
    step_of(watcher, 4, mismatch=0.4)
    with pytest.raises(DivergenceError) as stopped:
        step_of(watcher, 5, ess=0.2)
    assert str(stopped.value).splitlines()[0] == (
        "step 5: mismatch/ess_token was 0.2, guard.correct.ess=0.3, and 3 rollouts in a row were not learnt from."
    )


def test_entropy_drift_is_a_factor_to_either_side_of_the_first_step_that_learnt():
    watcher = guard(stop={"entropy_drift": 4.0}, patience=1)
    assert "guard/entropy_drift" not in watcher.look(0, {"mismatch/mean_abs": 0.1})
    drifts = [watcher.look(1, FINE | {"entropy": e})["guard/entropy_drift"] for e in (0.5, 1.0, 0.25, 2.0, 0.125)]
    assert drifts == [1, 2, 2, 4, 4]
    watcher.enforce()
    watcher.look(2, FINE | {"entropy": 0.1})
    with pytest.raises(
        DivergenceError, match="guard/entropy_drift was 5 in 1 steps in a row, guard.stop.entropy_drift=4"
    ):
        watcher.enforce()


@pytest.mark.parametrize("entropy", [0.0, -0.0, 1e-20])
def test_entropy_that_falls_to_nothing_is_beyond_every_factor_and_a_number(entropy):
    watcher = guard(stop={"entropy_drift": 1e6}, patience=1)
    watcher.look(0, FINE | {"entropy": 0.5})
    assert watcher.look(1, FINE | {"entropy": entropy})["guard/entropy_drift"] == 0.5 / LEAST_ENTROPY
    with pytest.raises(DivergenceError, match="guard/entropy_drift"):
        watcher.enforce()


def test_a_first_step_without_entropy_is_no_measure():
    watcher = guard(stop={"entropy_drift": 2.0}, patience=1)
    assert "guard/entropy_drift" not in watcher.look(0, FINE | {"entropy": 0.0})
    assert watcher.look(1, FINE | {"entropy": 0.5})["guard/entropy_drift"] == 1
    watcher.enforce()


def test_a_resumed_guard_judges_as_the_one_that_was_not_interrupted():
    limits: dict[str, Any] = {
        "stop": {"grad_norm": 10.0, "entropy_drift": 3.0},
        "warn": {"kl": 0.1},
        "correct": {"mismatch": 0.3},
    }
    said: list[str] = []
    again: list[str] = []
    whole, first, second = guard(said, 2, **limits), guard([], 2, **limits), guard(again, 2, **limits)
    for one in (whole, first):
        step_of(one, 0)
        step_of(one, 1, grad_norm=11, kl=0.2, mismatch=0.4)
    said.clear()
    second.restore(json.loads(json.dumps(first.state())))
    assert second.reads_back
    stops = []
    for one in (whole, second):
        with pytest.raises(DivergenceError) as stopped:
            step_of(one, 2, grad_norm=12, kl=0.2)
        stops.append(str(stopped.value))
        assert not one.reads_back
        assert one.look(3, FINE | {"entropy": 1.0})["guard/entropy_drift"] == 2
    assert stops[0] == stops[1] and said == again == []


def test_a_resumed_guard_goes_on_counting_rollouts_that_were_not_learnt_from():
    first, second = (guard(correct={"mismatch": 0.3}, patience=2) for _ in range(2))
    step_of(first, 0, mismatch=0.4)
    second.restore(json.loads(json.dumps(first.state())))
    with pytest.raises(DivergenceError, match="2 rollouts in a row were not learnt from"):
        step_of(second, 1, mismatch=0.4)


def test_without_limits_of_its_own_a_healthy_step_raises_and_says_nothing():
    said: list[str] = []
    watcher = Guard(GuardConfig(), said.append)
    for step in range(5):
        own = step_of(watcher, step)
        assert own["guard/warnings"] == own["guard/corrections"] == own["guard/left_out"] == 0
    assert said == []


def test_by_default_nothing_is_corrected():
    assert {getattr(CorrectLimits(), limit.name) for limit in fields(CorrectLimits)} == {None}


def test_what_is_watched_is_a_metric_and_what_is_advised_a_key():
    assert set(WATCHES) == {limit.name for limit in fields(Limits)}
    assert {watch.metric for watch in WATCHES.values()} <= set(METRICS)
    words = " ".join(w.cause + " " + w.change for w in WATCHES.values()).replace("(", " ").replace(")", " ").split()
    groups = {f.name for f in fields(RunConfig)}
    keys = [
        word.strip(",.:;").partition("=")[0] for word in words if word.partition(".")[0] in groups and "." in word[:-1]
    ]
    assert {"learner.backend", "learner.optimizer.lr", "reward.timeout_s", "sync.tiles"} <= set(keys)
    check_keys(RunConfig, keys)
