"""Estimators against their definitions, by enumeration; what a command writes, and where."""

import json
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from qarl.errors import ConfigError
from qarl.evaluate import evaluate
from qarl.evaluation import Evaluation, interval, pass_at_k, summary
from qarl.seeds import completion_seeds, mini_batch_order


@pytest.mark.parametrize("n, c, k", [(4, 1, 2), (5, 0, 3), (6, 6, 1), (6, 4, 3), (1, 1, 1)])
def test_pass_at_k_is_the_share_of_subsets_of_k_with_a_right_one(n, c, k):
    correct = np.array([[1.0] * c + [0.0] * (n - c)])
    subsets = list(combinations(correct[0], k))
    assert pass_at_k(correct, k)[0] == pytest.approx(np.mean([max(s) for s in subsets]), abs=1e-12)


def test_what_is_nearly_right_counts_in_the_mean_reward_alone():
    """As Reasoning Gym scores 153 and 5 where 53 was asked for; one table must not give two answers to one question."""
    found = Evaluation(np.array([[1.0, 2 / 3], [0.5, 0.0]]), [], 0)
    rows = {name: row["mean"] for name, row in summary(found).items()}
    assert rows.pop("reward") == pytest.approx(13 / 24)
    assert rows == {"mean@2": 0.25, "pass@1": 0.25, "pass@2": 0.5} and found.accuracy == 0.25


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


@pytest.fixture
def evaluated(composed, tmp_path, monkeypatch):
    """`evaluated("seed=1")`: the records in the folder once that evaluation is done; nothing is sampled, all of it right."""

    def fake(sampler, rewarder, prompts, *, n, sampling, seed):
        return Evaluation(np.ones((len(prompts), n)), [], 0)

    def tokenize(texts, add_special_tokens):
        return {"input_ids": [[1] * len(text) for text in texts]}

    monkeypatch.setattr("qarl.evaluation.evaluate", fake)
    monkeypatch.setattr("qarl.cluster.sampler_only", lambda *_: nullcontext())
    monkeypatch.setattr("qarl.rewards.Rewarder", lambda *_: nullcontext())
    monkeypatch.setattr("qarl.prepare.prepare_policy", lambda *_: ("folder", tokenize))
    rows = [{"question": "q" * length, "answer": "1"} for length in (1, 9, 2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (
        f"out={tmp_path}",
        "name=e",
        "model=folder",
        "model.path=a",
        "model.dtype=float32",
        "data=files",
        "data.train.source=missing.jsonl",
        f"data.heldout.source={tmp_path / 'rows.jsonl'}",
        "data.chat=false",
        "data.max_prompt_tokens=5",
        "data.overlong=drop",
    )

    def command(*overrides: str) -> list[dict]:
        evaluate(composed(*settings, *overrides))
        return [json.loads(file.read_text()) for file in sorted(Path(tmp_path, "e").iterdir())]

    return command


def test_an_evaluation_replaces_that_of_the_same_settings_alone(evaluated):
    assert len(evaluated()) == len(evaluated()) == 1
    others = (
        "model.path=b",
        "evaluation.n=2 evaluation.temperature=0.5",
        "evaluation.temperature=1",
        "seed=7",
        "rollout.sampling.max_tokens=9",
    )
    for already, other in enumerate(others, 1):
        assert len(evaluated(*other.split())) == already + 1, other
    assert {record["model"] for record in evaluated()} == {"a", "b"}


def test_a_plan_of_an_evaluation_is_refused(evaluated, tmp_path):
    with pytest.raises(ConfigError, match=r"^plan: true, but only qarl.train prints one"):
        evaluated("plan=true")
    assert not Path(tmp_path, "e").exists()


def test_rows_left_out_of_an_evaluation_are_said_and_recorded(evaluated, capsys):
    (record,) = evaluated()
    assert (record["prompts"], record["overlong"]) == (2, 1)
    assert "left out: 1 rows with too long a prompt" in capsys.readouterr().err
