"""When the guard stops a run, when it does not, and whether its message helps."""

import pytest

from qarl.config import GuardConfig
from qarl.errors import DivergenceError
from qarl.guard import CAUSES, Guard
from qarl.metrics import METRICS

FINE = {"mismatch/mean_abs": 0.01, "grad_norm": 1.0}


def test_stops_after_patience_steps_in_a_row_and_says_what_why_and_what_to_change():
    guard = Guard(GuardConfig(max_mismatch=0.5, patience=3))
    guard.check(0, FINE | {"mismatch/mean_abs": 0.7})
    guard.check(1, FINE | {"mismatch/mean_abs": 0.8})
    with pytest.raises(DivergenceError) as stopped:
        guard.check(2, FINE | {"mismatch/mean_abs": 0.9})
    message = str(stopped.value)
    assert message.startswith("step 2: mismatch/mean_abs was 0.7, 0.8, 0.9 in 3 steps in a row, guard.max_mismatch=0.5")
    for part in CAUSES["mismatch/mean_abs"]:
        assert part in message


def test_a_good_step_starts_the_count_again_and_a_step_without_the_metric_does_not():
    guard = Guard(GuardConfig(max_grad_norm=10.0, patience=2))
    for step in range(10):
        guard.check(step, FINE | {"grad_norm": 11.0 if step % 2 else 10.0})
    guard.check(10, {"mismatch/mean_abs": 0.01})
    with pytest.raises(DivergenceError, match="grad_norm was 11, 12 in 2 steps"):
        guard.check(11, FINE | {"grad_norm": 12.0})


@pytest.mark.parametrize("name", ["mismatch/mean_abs", "grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_stops_at_once(name: str, value: float):
    with pytest.raises(DivergenceError, match=f"step 7: {name} is {value}"):
        Guard(GuardConfig(patience=100)).check(7, FINE | {name: value})


def test_what_is_watched_is_a_metric_and_what_is_advised_a_key():
    from qarl.build import check_keys
    from qarl.config import RunConfig

    assert set(CAUSES) <= set(METRICS)
    check_keys(RunConfig, ["learner.backend", "learner.optimizer.lr", "learner.optimizer.warmup"])
    check_keys(RunConfig, ["guard.max_mismatch", "guard.max_grad_norm"])
