"""Mismatch weights against plain-Python loops over each response."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qarl.algorithm import Correction, icepop
from qarl.corrections import correction_weights

responses = st.lists(st.lists(st.tuples(st.floats(-8, 0), st.floats(-8, 0)), max_size=5), max_size=4)


def packed(batch):
    old = torch.tensor([pair[0] for response in batch for pair in response], dtype=torch.float32)
    sampler = torch.tensor([pair[1] for response in batch for pair in response], dtype=torch.float32)
    sequence = torch.tensor([i for i, response in enumerate(batch) for _ in response], dtype=torch.int64)
    return old, sampler, sequence


def ratio_reference(old, sampler, sequence, level):
    """w of each token, by the definition of the level."""
    delta = [o - s for o, s in zip(old.tolist(), sampler.tolist(), strict=True)]
    if level == "token":
        return [math.exp(d) for d in delta]
    values = []
    for i in sequence.tolist():
        own = [d for d, j in zip(delta, sequence.tolist(), strict=True) if j == i]
        log_ratio = math.fsum(own) / (len(own) if level == "sequence" else 1)
        values.append(math.exp(max(-20.0, min(20.0, log_ratio))))
    return values


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_sum"])
@pytest.mark.parametrize("kind", ["none", "tis", "mis"])
@settings(max_examples=40, deadline=None)
@given(batch=responses)
def test_equal_the_definition(kind, level, batch):
    old, sampler, sequence = packed(batch)
    floor = 0.5 if kind == "mis" else 0.0
    correction = Correction(kind=kind, level=level, cap=1.5, floor=floor)
    actual = correction_weights(old, sampler, sequence, len(batch), correction)
    expected = ratio_reference(old, sampler, sequence, level)
    for w, weight, high, low in zip(expected, *map(torch.Tensor.tolist, actual), strict=True):
        if min(abs(w - 1.5), abs(w - floor)) < 1e-9:
            continue  # on the threshold itself the two sums' roundings decide
        kept = {"none": 1.0, "tis": min(w, 1.5), "mis": w if floor <= w <= 1.5 else 0.0}[kind]
        assert weight == pytest.approx(kept, rel=1e-12)  # float64: a few roundings of a sum of 5, times exp
        assert (high, low) == ((False, False) if kind == "none" else (w > 1.5, w < floor))


def test_weights_carry_no_gradient():
    old = torch.zeros(3, requires_grad=True)
    weights = correction_weights(old, torch.ones(3), torch.zeros(3, dtype=torch.int64), 1, icepop()).weights
    assert not weights.requires_grad


def test_icepop_keeps_the_weights_inside_its_band_and_zeroes_the_others():
    w = torch.tensor([0.1, 0.49, 0.51, 1.0, 4.9, 5.1, 100.0])
    actual = correction_weights(w.log(), torch.zeros(7), torch.zeros(7, dtype=torch.int64), 1, icepop())
    # float32 logarithms of the inputs: 1e-6 relative
    torch.testing.assert_close(actual.weights.float(), torch.tensor([0, 0, 0.51, 1, 4.9, 0, 0]), rtol=1e-6, atol=0)
    assert (actual.high.sum().item(), actual.low.sum().item()) == (2, 2)


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_sum"])
@pytest.mark.parametrize("gap", [-300.0, 300.0])
def test_a_ratio_that_overflows_float32_stays_finite(level, gap):
    correction = Correction(kind="tis", level=level, cap=2.0)
    old = torch.full((4,), gap)
    weights = correction_weights(old, torch.zeros(4), torch.zeros(4, dtype=torch.int64), 1, correction).weights
    assert weights.tolist() == ([2.0] * 4 if gap > 0 else pytest.approx([math.exp(-20)] * 4))
