"""Held-out accuracy: what the engine answers, verified, with the estimators and intervals people quote."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qarl.cluster import Sampler
from qarl.records import Completion, Prompt, Sampling
from qarl.rewards import Rewarder
from qarl.seeds import completion_seeds

BOOTSTRAPS = 2000
RIGHT = 1.0
"""Reward from which on a response is right: the full one. Reasoning Gym gives 153 two thirds where 53 was asked for."""


@dataclass(frozen=True)
class Evaluation:
    """Scores of n completions of each prompt."""

    rewards: np.ndarray
    """float64 [prompts, n]; some scorers give part of one for what is nearly right."""
    completions: Sequence[Completion]
    """In the same order, row by row."""
    unscored: int
    """Completions that count as 0 because the scorer did not answer in time, ended or raised."""

    @property
    def accuracy(self) -> float:
        """mean@n: the share of completions that are right."""
        return float(right(self.rewards).mean())


def evaluate(
    sampler: Sampler, rewarder: Rewarder, prompts: Sequence[Prompt], *, n: int, sampling: Sampling, seed: int
) -> Evaluation:
    """Sample `n` completions of every prompt and score them. The same seed draws the same completions."""
    seeds = completion_seeds(seed, "evaluation", 0, len(prompts), n)
    completions = sampler.generate(prompts, sampling, seeds)
    rewards = rewarder.score([c.text for c in completions], [p for p in prompts for _ in range(n)])
    return Evaluation(rewards.values.reshape(len(prompts), n), completions, rewards.timeouts + rewards.crashes)


def right(rewards: np.ndarray) -> np.ndarray:
    """bool, of the same shape: what accuracy and pass@k count."""
    return rewards >= RIGHT


def pass_at_k(rewards: np.ndarray, k: int) -> np.ndarray:
    """Chance that at least one of k completions is right, for each prompt: 1 - C(n - c, k) / C(n, k), unbiased.

    `rewards` [prompts, n]; returns float64 [prompts]. Source: Chen et al. 2021, equation 1. Raises `ValueError` where k is
    not in 1..n.
    """
    n = rewards.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"k must lie between 1 and n = {n}, got {k}")
    wrong = n - right(rewards).sum(axis=1)
    return np.array([1.0 - math.comb(int(w), k) / math.comb(n, k) for w in wrong])


def interval(per_prompt: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over prompts (percentiles of resampled means); prompts are what is drawn."""
    if len(per_prompt) == 0:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    means = [per_prompt[rng.integers(len(per_prompt), size=len(per_prompt))].mean() for _ in range(BOOTSTRAPS)]
    return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))


def summary(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """The mean reward, mean@n and pass@k for k = 1, 2, 4, … n, each with its mean and interval."""
    n = evaluation.rewards.shape[1]
    rows = {"reward": evaluation.rewards.mean(axis=1), f"mean@{n}": right(evaluation.rewards).mean(axis=1)}
    for k in [2**i for i in range(n.bit_length()) if 2**i <= n]:
        rows[f"pass@{k}"] = pass_at_k(evaluation.rewards, k)
    return {name: _row(values) for name, values in rows.items()}


def _row(values: np.ndarray) -> dict[str, float]:
    low, high = interval(values)
    return {"mean": float(values.mean()), "low": low, "high": high}
