"""From completions to what the learner takes: rewards, advantages, old log-probs, mini-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from qarl.advantages import advantages, advantages_of_known
from qarl.algorithm import AdvantageKind
from qarl.batching import pack, pack_to_score
from qarl.cluster import LearnerGroup
from qarl.error_tokens import garbling_rate, repetition_rate
from qarl.errors import SyncError
from qarl.records import Completion, MiniBatch, Prompt, Sample


def to_samples(
    prompts: Sequence[Prompt],
    completions: Sequence[Completion],
    rewards: np.ndarray,
    kind: AdvantageKind,
    left_out: np.ndarray | None = None,
) -> list[Sample]:
    """Completions with their rewards [prompts x group], advantages within each group and error tokens, prompt by prompt.

    `left_out`: bool [prompts x group], rewards that say nothing: advantage 0, and no part in those of their groups. They stay in
    the batch, so that neither mini-batches nor the weight of another response depend on how many there are.
    """
    group = len(completions) // len(prompts)
    rewards_PG = torch.from_numpy(rewards.reshape(len(prompts), group))
    if left_out is None:
        gained = advantages(rewards_PG, kind)
    else:
        gained = advantages_of_known(rewards_PG, torch.from_numpy(~left_out.reshape(len(prompts), group)), kind)
    asked = [p for p in prompts for _ in range(group)]
    assert [c.prompt for c in completions] == [p.id for p in asked], "completions are not in the order of their prompts"
    return [
        Sample(
            completion,
            prompt.tokens,
            float(reward),
            advantage,
            repetition=repetition_rate(completion.tokens),
            garbling=garbling_rate(completion.text),
        )
        for completion, prompt, reward, advantage in zip(
            completions, asked, rewards, gained.flatten().tolist(), strict=True
        )
    ]


def check_version(completions: Sequence[Completion], version: int) -> None:
    """Raise `SyncError` where a completion was not written by the published version, which is the one `score` computes with."""
    others = sorted({c.version for c in completions} - {version})
    if others:
        raise SyncError(f"version {version} is published, but completions were written by {others}")


def score(learner: LearnerGroup, samples: Sequence[Sample]) -> list[Sample]:
    """The same samples with `old_logprobs`: the aligned forward at the version that is published."""
    sequences = [np.concatenate([s.prompt_tokens, s.completion.tokens]) for s in samples]
    prompt_lengths = [len(s.prompt_tokens) for s in samples]
    batch, order = pack_to_score(sequences, learner.ranks, learner.tokens, prompt_lengths)
    logprobs = order.unpack(learner.score(batch))
    return [replace(sample, old_logprobs=values) for sample, values in zip(samples, logprobs, strict=True)]


def deal(samples: Sequence[Sample], order: np.ndarray, parts: int, ranks: int, tokens: int) -> list[MiniBatch]:
    """The mini-batches of a rollout: samples in `order` (a permutation), cut into `parts` of equal size, packed."""
    return [pack([samples[i] for i in part], ranks, tokens) for part in np.split(order, parts)]
