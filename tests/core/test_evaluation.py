"""Estimators against their definitions, by enumeration."""

from itertools import combinations

import numpy as np
import pytest

from qarl.evaluation import interval, pass_at_k
from qarl.seeds import completion_seeds, mini_batch_order


@pytest.mark.parametrize("n, c, k", [(4, 1, 2), (5, 0, 3), (6, 6, 1), (6, 4, 3), (1, 1, 1)])
def test_pass_at_k_is_the_share_of_subsets_of_k_with_a_right_one(n, c, k):
    correct = np.array([[1.0] * c + [0.0] * (n - c)])
    subsets = list(combinations(correct[0], k))
    assert pass_at_k(correct, k)[0] == pytest.approx(np.mean([max(s) for s in subsets]), abs=1e-12)


@pytest.mark.parametrize("k", [0, 5])
def test_k_beyond_the_completions_is_refused(k):
    with pytest.raises(ValueError, match="k must lie between 1 and n = 4"):
        pass_at_k(np.ones((2, 4)), k)


def test_the_interval_covers_the_mean_95_times_in_100():
    """400 experiments of 100 prompts at p = 0.3; the count of hits is binomial, so 0.92 … 0.98 is three deviations."""
    rng = np.random.default_rng(0)
    hits = 0
    for experiment in range(400):
        low, high = interval((rng.random(100) < 0.3).astype(float), seed=experiment)
        hits += low <= 0.3 <= high
    assert 0.915 <= hits / 400 <= 0.98


def test_seeds_differ_by_purpose_step_prompt_and_completion_and_repeat():
    a = completion_seeds(0, "rollout", 3, 4, 2)
    assert np.array_equal(a, completion_seeds(0, "rollout", 3, 4, 2)) and a.dtype == np.int64
    others = [completion_seeds(1, "rollout", 3, 4, 2), completion_seeds(0, "rollout", 4, 4, 2)]
    others.append(completion_seeds(0, "evaluation", 3, 4, 2))
    assert len({*a.flat, *(s for o in others for s in o.flat)}) == 32


def test_the_order_of_a_step_is_a_permutation_and_repeats():
    order = mini_batch_order(0, 3, 50)
    assert sorted(order) == list(range(50)) and np.array_equal(order, mini_batch_order(0, 3, 50))
    assert not np.array_equal(order, mini_batch_order(0, 4, 50))
