"""The numbers of one step, from what its stages left behind. Names and units stand in `qarl.metrics.METRICS`."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch

from qarl.error_tokens import error_token_metrics
from qarl.mismatch import mismatch_statistics
from qarl.objectives import combine, finalize, largest
from qarl.records import Sample, UpdateStats
from qarl.rewards import Rewards
from qarl.stages import Stages


class Stopwatch(Stages):
    """Seconds by stage since the last lap. What a step spends after its lap (log, checkpoint) counts to the next."""

    def __init__(self) -> None:
        super().__init__()
        self._start = time.perf_counter()

    def lap(self) -> dict[str, float]:
        """`time/*` since the last lap; `other` is what no stage accounts for."""
        now = time.perf_counter()
        step, seconds = now - self._start, self.seconds
        self._start, self.seconds = now, {}
        seconds["other"] = step - sum(seconds.values())
        return {f"time/{stage}_s": value for stage, value in seconds.items()} | {"time/step_s": step}


def reward_metrics(rewards: Rewards) -> dict[str, float]:
    """What became of the scoring itself."""
    return {
        "reward/timeouts": float(rewards.timeouts),
        "reward/timeout_share": float(rewards.timed_out.mean()),
        "reward/crashes": float(rewards.crashes),
    }


def sample_metrics(samples: Sequence[Sample], group: int) -> dict[str, float]:
    """Rewards, lengths, mismatch and error tokens of a step's samples, which are scored and in order of their prompts."""
    rewards = np.array([s.reward for s in samples])
    lengths = np.array([len(s.completion.tokens) for s in samples])
    gained = np.array([s.advantage for s in samples]).reshape(-1, group)
    old = _packed([s.old_logprobs for s in samples if s.old_logprobs is not None])
    sampler = _packed([s.completion.logprobs for s in samples])
    sequence = torch.from_numpy(np.repeat(np.arange(len(samples)), lengths))
    return {
        "reward/mean": rewards.mean(),
        "reward/std": rewards.std(),
        "reward/min": rewards.min(),
        "reward/max": rewards.max(),
        "reward/flat_groups": (gained == 0).all(axis=1).mean(),  # exact; the deviation of three 0.1 is not 0
        "length/mean": lengths.mean(),
        "length/max": lengths.max(),
        "length/truncated": float(np.mean([s.completion.finish == "length" for s in samples])),
        "tokens": lengths.sum(),
        **mismatch_statistics(old, sampler, sequence, len(samples)),
        **error_token_metrics([s.repetition for s in samples], [s.garbling for s in samples]),
    }


def update_metrics(updates: Sequence[UpdateStats]) -> dict[str, float]:
    """What the optimizer steps of one rollout saw: shares over all of them, the largest KL and gradient norm, the last rate.
    Nothing where there was none."""
    if not updates:
        return {}
    seconds = {f"learn/{stage}_s": sum(u.seconds.get(stage, 0.0) for u in updates) for stage in updates[0].seconds}
    sums = combine([u.sums for u in updates])
    sums["loss"] /= len(updates)  # each update's is a mean over its own mini-batch already
    return {
        **finalize(sums),
        "objective/kl_step": step_kl(updates),
        "grad_norm": largest([u.grad_norm for u in updates]),
        "lr": updates[-1].lr,
        **seconds,
    }


def step_kl(updates: Sequence[UpdateStats]) -> float:
    """Largest KL(published || current learner) that an update of one rollout began with, nats a token."""
    return largest([finalize(u.sums)["objective/kl_step"] for u in updates])


def _packed(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts) if parts else np.empty(0, np.float32))
