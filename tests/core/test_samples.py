"""Completions that the learner may take."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from qarl.advantages import advantages
from qarl.batching import pack
from qarl.errors import SyncError
from qarl.measure import sample_metrics
from qarl.records import Completion, Prompt
from qarl.samples import check_version, to_samples


def written_by(version: int) -> Completion:
    return Completion(0, 0, np.zeros(1, np.int32), np.zeros(1, np.float32), "", "stop", version)


def test_completions_of_another_version_than_is_published_are_refused():
    check_version([written_by(3), written_by(3)], 3)
    with pytest.raises(SyncError, match=r"version 3 is published, but completions were written by \[2\]"):
        check_version([written_by(3), written_by(2)], 3)


def test_samples_carry_their_error_tokens():
    texts = {"right": "1 + 2 = 3", "loop": "no " * 20, "garbage": "�" * 9}
    completions = [
        Completion(7, i, np.array([ord(c) for c in text], np.int32), np.zeros(len(text), np.float32), text, "stop", 0)
        for i, text in enumerate(texts.values())
    ]
    prompt = Prompt(7, "question", np.zeros(2, np.int32), "3")
    samples = to_samples([prompt], completions, np.array([1.0, 0.0, 0.0]), "grpo")
    assert [s.is_error for s in samples] == [False, True, True]
    assert [(s.repetition, s.garbling) for s in samples] == [(0, 0), (1, 0), (1, 1)]
    (micro,) = pack(samples, ranks=1, tokens=200).ranks[0]
    assert micro.errors is not None and sorted(micro.errors.tolist()) == [False, True, True]
    assert micro.errors[micro.advantages > 0].tolist() == [False]


def test_a_reward_that_is_left_out_gives_no_advantage_and_changes_no_other():
    completions = [replace(written_by(0), prompt=prompt) for prompt in (1, 1, 1, 1, 2, 2, 2, 2)]
    prompts = [Prompt(i, "", np.zeros(1, np.int32), "") for i in (1, 2)]
    rewards, left_out = np.array([1.0, 0, 0, 1, 0, 1, 0, 0]), np.array([0, 0, 1, 0, 0, 0, 0, 0], bool)
    found = [s.advantage for s in to_samples(prompts, completions, rewards, "grpo", left_out)]
    first, second = advantages(torch.tensor([[1.0, 0, 1]]), "grpo"), advantages(torch.tensor([[0.0, 1, 0, 0]]), "grpo")
    assert found == [*first[0, :2].tolist(), 0.0, first[0, 2].item(), *second[0].tolist()]
    counted = [s.advantage for s in to_samples(prompts, completions, rewards, "grpo")]
    batch = pack(to_samples(prompts, completions, rewards, "grpo", left_out), ranks=1, tokens=100)
    assert (batch.n_sequences, batch.n_tokens) == (8, sum(len(c.tokens) for c in completions)), (
        "as if none were left out"
    )
    assert counted[2] < 0 and counted[0] > found[0] and counted[4:] == found[4:]
    none_known = to_samples(prompts, completions, rewards, "rloo", np.ones(8, bool))
    assert {s.advantage for s in none_known} == {0.0}


def test_a_group_is_flat_where_it_teaches_nothing():
    """Equal rewards are flat whatever their float deviation is, and so is what is left when one is left out."""
    completions = [replace(written_by(0), prompt=prompt) for prompt in (1, 1, 1, 2, 2, 2, 3, 3, 3)]
    prompts = [Prompt(i, "", np.zeros(1, np.int32), "") for i in (1, 2, 3)]
    rewards = np.array([0.1, 0.1, 0.1, 1, 1, 0, 1, 0, 0])
    assert rewards[:3].std() != 0
    for left_out, expected in ((None, 1 / 3), (np.arange(9) == 5, 2 / 3)):
        samples = to_samples(prompts, completions, rewards, "grpo", left_out)
        scored = [replace(s, old_logprobs=s.completion.logprobs) for s in samples]
        assert sample_metrics(scored, 3)["reward/flat_groups"] == pytest.approx(expected)
