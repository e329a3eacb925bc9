"""Mismatch statistics against numpy in float64."""

import math

import numpy as np
import pytest
import torch

from qarl.mismatch import mismatch_statistics


def batch(seed=0, lengths=(5, 0, 40, 1, 12), gap=0.3):
    rng = np.random.default_rng(seed)
    old = -rng.exponential(1.0, sum(lengths))
    sampler = old + gap * rng.standard_normal(sum(lengths))
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    return old.astype(np.float32), sampler.astype(np.float32), sequence, len(lengths)


def statistics(old, sampler, sequence, n):
    return mismatch_statistics(torch.from_numpy(old), torch.from_numpy(sampler), torch.from_numpy(sequence), n)


def test_equal_the_definitions():
    old, sampler, sequence, n = batch()
    delta = old.astype(np.float64) - sampler.astype(np.float64)
    w = np.exp(delta)
    w_sequence = np.exp([delta[sequence == i].sum() for i in range(n) if (sequence == i).any()])
    expected = {
        "mismatch/mean_abs": np.abs(delta).mean(),
        "mismatch/max_abs": np.abs(delta).max(),
        "mismatch/k1": -delta.mean(),
        "mismatch/k3": (w - 1 - delta).mean(),
        "mismatch/chi2": (w**2).mean() - 1,
        "mismatch/ess_token": w.sum() ** 2 / (len(w) * (w**2).sum()),
        "mismatch/ess_sequence": w_sequence.sum() ** 2 / (len(w_sequence) * (w_sequence**2).sum()),
        "mismatch/pearson": np.corrcoef(np.exp(old.astype(np.float64)), np.exp(sampler.astype(np.float64)))[0, 1],
        "mismatch/ratio_max": w.max(),
        "mismatch/tokens": 58.0,
        "mismatch/dropped_tokens": 0.0,
        "mismatch/dropped_share": 0.0,
    }
    assert statistics(old, sampler, sequence, n) == pytest.approx(expected, rel=1e-11)  # float64, other summation order


def test_k1_and_k3_estimate_the_kl_divergence_from_sampler_to_learner():
    rng = np.random.default_rng(0)
    learner, sampler = np.array([0.5, 0.3, 0.2]), np.array([0.4, 0.35, 0.25])
    tokens = rng.choice(3, size=200_000, p=sampler)
    kl = (sampler * np.log(sampler / learner)).sum()
    one = np.zeros(len(tokens), dtype=np.int64)
    result = statistics(np.log(learner)[tokens], np.log(sampler)[tokens], one, 1)
    # 200 000 draws: the standard error of k1 is about 4e-4, of k3 about 5e-5; five of them
    assert result["mismatch/k1"] == pytest.approx(kl, abs=2e-3)
    assert result["mismatch/k3"] == pytest.approx(kl, abs=3e-4)
    chi2 = (learner**2 / sampler).sum() - 1
    assert result["mismatch/chi2"] == pytest.approx(chi2, abs=5e-3)  # standard error of w^2 about 8e-4


def test_equal_policies_have_no_mismatch():
    old, _, sequence, n = batch()
    result = statistics(old, old, sequence, n)
    ones = {"mismatch/ess_token", "mismatch/ess_sequence", "mismatch/pearson", "mismatch/ratio_max"}
    # exactly, but for ess: log-sum-exp rounds in the last place
    assert {k: v for k, v in result.items() if k != "mismatch/tokens"} == pytest.approx(
        {k: float(k in ones) for k in result if k != "mismatch/tokens"}, abs=1e-14
    )


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("side", ["old", "sampler"])
def test_non_finite_tokens_are_left_out_and_counted(bad, side):
    old, sampler, sequence, n = batch()
    (old if side == "old" else sampler)[2] = bad  # in the first response
    result = statistics(old, sampler, sequence, n)
    kept = np.arange(len(old)) != 2
    others = statistics(old[kept], sampler[kept], sequence[kept], n)
    assert result["mismatch/dropped_tokens"] == 1
    whole = sequence > 0
    ess_sequence = statistics(old[whole], sampler[whole], sequence[whole], n)["mismatch/ess_sequence"]
    dropped = {"mismatch/dropped_tokens": 1.0, "mismatch/dropped_share": 1 / 58}
    assert result == {**others, **dropped, "mismatch/ess_sequence": ess_sequence}


@pytest.mark.parametrize("gap", [-500.0, 500.0])
def test_ratios_that_overflow_stay_finite(gap):
    old, sampler, sequence, n = batch()
    old[7] += gap
    result = statistics(old, sampler, sequence, n)
    assert all(map(math.isfinite, result.values()))
    assert result["mismatch/ratio_max"] == (math.exp(20) if gap > 0 else pytest.approx(2, abs=1))
    assert 0 < result["mismatch/ess_token"] <= 1 and 0 < result["mismatch/ess_sequence"] <= 1


@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_no_tokens_are_no_mismatch(lengths):
    result = statistics(*batch(lengths=lengths))
    assert result["mismatch/tokens"] == 0 and result["mismatch/mean_abs"] == 0 and result["mismatch/ess_token"] == 1


def test_all_tokens_broken_are_counted_and_finite():
    old, sampler, sequence, n = batch()
    result = statistics(np.full_like(old, np.nan), sampler, sequence, n)
    assert (
        result["mismatch/dropped_tokens"] == 58
        and result["mismatch/dropped_share"] == 1
        and all(map(math.isfinite, result.values()))
    )


def test_pearson_of_a_constant_side_is_zero():
    old, sampler, sequence, n = batch()
    assert statistics(np.full_like(old, np.log(0.1)), sampler, sequence, n)["mismatch/pearson"] == 0
