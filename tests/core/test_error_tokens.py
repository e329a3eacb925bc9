"""Repetition rate against a slow definition read off the docstring."""

import numpy as np
import pytest

from qarl.error_tokens import COPIES, MAX_NGRAM, MIN_TOKENS, error_token_metrics, repetition_rate


def brute_force(tokens: list[int]) -> float:
    """Every window [i, j) that some n <= 32 tiles at least 3 times, over at least 8 tokens."""
    inside = set()
    for n in range(1, MAX_NGRAM + 1):
        for i in range(len(tokens)):
            j = i + n
            while j < len(tokens) and tokens[j] == tokens[j - n]:
                j += 1
            if j - i >= max(COPIES * n, MIN_TOKENS):
                inside |= set(range(i, j))
    return len(inside) / len(tokens) if tokens else 0.0


def test_equals_the_definition_on_random_sequences_with_planted_loops():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        loop = rng.integers(0, 5, rng.integers(1, 40)).tolist() * int(rng.integers(0, 6))
        tokens = rng.integers(0, 4, rng.integers(0, 30)).tolist() + loop + rng.integers(0, 4, 7).tolist()
        expected = brute_force(tokens)
        seen.add(expected > 0)
        assert repetition_rate(np.array(tokens, np.int32)) == pytest.approx(expected, abs=1e-12)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        ([], 0.0),
        ([7], 0.0),
        ([1, 0, 0, 0], 0.0),  # "1000"
        ([5, 9] * 3, 0.0),  # "no, no, no"
        ([5] * 8, 1.0),
        ([1, 2, 3, 4] + [5, 9] * 4, 8 / 12),
        (list(range(100)), 0.0),
        (list(range(32)) * 3, 1.0),
        (list(range(33)) * 3, 0.0),  # longer than the longest n-gram looked for
    ],
)
def test_known_sequences(tokens: list[int], rate: float):
    assert repetition_rate(np.array(tokens, np.int32)) == pytest.approx(rate)


def test_metrics_are_the_mean_rate_and_the_share_of_garbled_responses():
    responses = [np.array([5] * 10), np.array([1, 2, 3, 4] * 2 + [6] * 8), np.arange(9), np.array([], np.int32)]
    found = error_token_metrics(responses)
    assert found == {"error_tokens/repetition_rate": pytest.approx((1 + 0.5) / 4), "error_tokens/share": 0.25}
    assert error_token_metrics([]) == {"error_tokens/repetition_rate": 0.0, "error_tokens/share": 0.0}
