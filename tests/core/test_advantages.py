"""Advantages against plain-Python float64 loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qarl.advantages import STD_EPSILON, advantages

KINDS = ["grpo", "dr_grpo", "rloo"]
rewards_PG = st.integers(1, 6).flatmap(
    lambda g: st.lists(st.lists(st.floats(-10, 10, width=32), min_size=g, max_size=g), min_size=1, max_size=4)
)


def reference(group: list[float], kind: str) -> list[float]:
    n = len(group)
    if n == 1 or len(set(group)) == 1:
        return [0.0] * n
    if kind == "rloo":
        return [r - math.fsum(group[:i] + group[i + 1 :]) / (n - 1) for i, r in enumerate(group)]
    mean = math.fsum(group) / n
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / (n - 1))
    return [(r - mean) / (std + STD_EPSILON if kind == "grpo" else 1) for r in group]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(rewards=rewards_PG)
def test_equal_the_definition(kind, rewards):
    actual = advantages(torch.tensor(rewards), kind)
    expected = torch.tensor([reference(group, kind) for group in rewards], dtype=torch.float64)
    # float32 output: 2^-24 relative. atol: rewards of size 10 centred in float64 leave 1e-15, over STD_EPSILON 1e-9.
    torch.testing.assert_close(actual.double(), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reward", [0.1, 1.0, -3.3, 1e30])
@pytest.mark.parametrize("group", [1, 3, 7])
def test_equal_rewards_give_exactly_zero(kind, reward, group):
    assert advantages(torch.full((2, group), reward, dtype=torch.float64), kind).tolist() == [[0.0] * group] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_no_prompts_give_no_advantages(kind):
    assert advantages(torch.zeros(0, 4), kind).shape == (0, 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_named_by_its_position(kind, bad):
    rewards = torch.zeros(2, 3)
    rewards[1, 2] = bad
    with pytest.raises(ValueError, match=r"rewards\[1, 2\]"):
        advantages(rewards, kind)


def test_rewards_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\[prompts, group\]"):
        advantages(torch.zeros(3), "rloo")


def test_an_unknown_kind_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'gae' is not one of"):
        advantages(torch.zeros(2, 2), "gae")  # type: ignore[arg-type]


def test_integer_rewards_are_not_rounded():
    assert advantages(torch.tensor([[0, 1]]), "dr_grpo").tolist() == [[-0.5, 0.5]]
