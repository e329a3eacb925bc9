"""Sums over packed responses, empty ones included."""

import math

import torch

from qarl.packed import bounded_exp, lengths, segment_mean, segment_sum, valid_sequences

SEQUENCE = torch.tensor([1, 1, 1, 3])  # responses 0, 2 and 4 have no tokens


def test_an_empty_response_has_length_sum_and_mean_zero():
    values = torch.tensor([1.0, 2.0, 6.0, -4.0])
    assert lengths(SEQUENCE, 5).tolist() == [0, 3, 0, 1, 0]
    assert segment_sum(values, SEQUENCE, 5).tolist() == [0, 9, 0, -4, 0]
    assert segment_mean(values, SEQUENCE, 5).tolist() == [0, 3, 0, -4, 0]


def test_valid_responses_have_tokens_and_finite_logprobs():
    fine, broken = torch.zeros(4), torch.tensor([0.0, -math.inf, 0.0, 0.0])
    assert valid_sequences(fine, fine, SEQUENCE, 5).tolist() == [False, True, False, True, False]
    assert valid_sequences(fine, broken, SEQUENCE, 5).tolist() == [False, False, False, True, False]
    assert valid_sequences(broken, fine, SEQUENCE, 5).tolist() == [False, False, False, True, False]


def test_exp_is_bounded_but_keeps_nan():
    values = bounded_exp(torch.tensor([-math.inf, 0.0, math.inf, math.nan], dtype=torch.float64)).tolist()
    assert values[:3] == [math.exp(-20), 1.0, math.exp(20)] and math.isnan(values[3])
