"""The torch engine's draw: stateless, exact in distribution."""

import numpy as np
import pytest
import torch

from qarl.records import Sampling
from qarl.rollout.torch_engine import sample, truncate, uniform


def test_uniform_depends_on_seed_and_position_and_nothing_else():
    assert uniform(3, 5) == uniform(3, 5)
    draws = {uniform(seed, position) for seed in range(50) for position in range(50)}
    assert len(draws) == 2500
    assert all(0 <= u < 1 for u in draws)


@pytest.mark.parametrize("axis", ["seed", "position"])
def test_uniform_is_flat_and_neighbours_are_independent(axis: str):
    draws = np.array([uniform(i, 7) if axis == "seed" else uniform(7, i) for i in range(20000)])
    counts, _ = np.histogram(draws, bins=50, range=(0, 1))
    assert abs(counts - 400).max() < 5 * 20
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.03


def test_a_negative_seed_and_a_seed_of_64_bits_are_seeds_too():
    assert len({uniform(-1, 0), uniform(2**62, 0), uniform(2**63 - 1, 0), uniform(0, 0)}) == 4


def test_a_token_is_the_inverse_of_the_cumulative_distribution():
    logits = torch.log(torch.tensor([[0.2, 0.5, 0.3]])).expand(5, 3)
    tokens, logprobs = sample(logits, Sampling(), [0.0, 0.19, 0.21, 0.69, 0.999999])
    assert tokens.tolist() == [0, 0, 1, 1, 2]
    assert logprobs.exp().tolist() == pytest.approx([0.2, 0.2, 0.5, 0.5, 0.3])


def test_a_token_of_probability_zero_is_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, 5)
    assert sample(logits, Sampling(), [0.0, 0.5, 1 - 2**-53])[0].tolist() == [1, 3, 3]


def test_temperature_divides_the_logits():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = sample(logits, Sampling(temperature=0.5), [0.1, 0.4, 0.6, 0.9])
    expected = (logits / 0.5).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert torch.allclose(logprobs, expected)


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [(0, 1.0, [0, 1, 2, 3]), (2, 1.0, [1, 2]), (0, 0.6, [1, 2]), (0, 0.5, [1]), (9, 0.01, [1])],
)
def test_truncation_keeps_the_fewest_tokens_that_suffice(top_k: int, top_p: float, kept: list[int]):
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.25, 0.15]]))
    assert truncate(logits, top_k, top_p).isfinite().nonzero()[:, 1].tolist() == kept
