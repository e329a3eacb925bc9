"""Packing: nothing lost, budget kept, ranks equal, and back again."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qarl.batching import pack, pack_to_score, spread
from qarl.errors import ConfigError
from qarl.records import Completion, Sample


def make_sample(i, prompt, response, *, bad=None, old=True):
    tokens = np.arange(response, dtype=np.int32) + 100 * i
    logprobs = -np.arange(response, dtype=np.float32)
    learner = logprobs + 1
    if bad is not None:
        logprobs[0] = bad
    completion = Completion(i, 0, tokens, logprobs, "", "stop", 0)
    prompt_tokens = -np.arange(prompt, dtype=np.int32) - 1
    return Sample(completion, prompt_tokens, 0.0, float(i), learner if old else None)


lengths_strategy = st.lists(st.integers(1, 50), max_size=40)


@settings(deadline=None)
@given(lengths_strategy, st.integers(1, 5), st.integers(50, 120))
def test_every_sequence_is_packed_once_within_the_budget(lengths, ranks, tokens):
    bins = spread(lengths, ranks, tokens)
    assert sorted(i for rank in bins for bin in rank for i in bin) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in bin) <= tokens for rank in bins for bin in rank)
    assert len(bins) == ranks and len({len(rank) for rank in bins}) == 1 and len(bins[0]) >= 1
    assert bins == spread(lengths, ranks, tokens)


@settings(deadline=None)
@given(lengths_strategy, st.integers(1, 3), st.integers(50, 120))
def test_micro_batches_are_no_more_than_twice_what_the_tokens_need(lengths, ranks, tokens):
    n = sum(len(rank) for rank in spread(lengths, ranks, tokens))
    crowded = sum(length > tokens / 2 for length in lengths)
    enough = max(-(-sum(lengths) // tokens), crowded)
    assert n >= enough
    assert n <= 2 * max(enough, 1) + ranks


def fewest(lengths, tokens, rooms=()):
    """Bins of the best packing: each length in turn into every bin that has room, or into one more."""
    if not lengths:
        return len(rooms)
    first, *rest = lengths
    tried = {
        tuple(sorted((*rooms[:i], room - first, *rooms[i + 1 :]))) for i, room in enumerate(rooms) if room >= first
    }
    return min(fewest(rest, tokens, rooms) for rooms in tried | {tuple(sorted((*rooms, tokens - first)))})


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=7))
def test_packing_is_as_near_to_the_best_as_first_fit_decreasing_guarantees(lengths):
    """11/9 of the optimum plus 6/9 (Dósa 2007)."""
    assert len(spread(lengths, 1, 12)[0]) <= (11 * fewest(lengths, 12) + 6) // 9


def test_short_sequences_fill_the_room_that_long_ones_leave():
    """Taken one after the other, or longest first but into the last bin alone, they would need six and four."""
    assert len(spread([6, 6, 6, 4, 4, 4], 1, 10)[0]) == 3
    assert len(spread([6, 4, 6, 4, 6, 4], 1, 10)[0]) == 3


def test_ranks_get_even_loads():
    lengths = [10] * 12 + [30] * 4
    bins = spread(lengths, 2, 120)
    loads = [[sum(lengths[i] for i in bin) for bin in rank] for rank in bins]
    assert loads == [[120], [120]]


def test_a_sequence_beyond_the_budget_is_refused_by_name():
    with pytest.raises(ConfigError, match="learner.tokens: 10 cannot hold a sequence of 11 tokens"):
        spread([3, 11], 1, 10)


def test_micro_batch_holds_the_samples_in_the_layout_of_the_records():
    batch = pack([make_sample(0, 2, 1), make_sample(1, 1, 2)], ranks=1, tokens=10)
    (micro,) = batch.ranks[0]
    assert micro.tokens.tolist() == [-1, -2, 0, -1, 100, 101]
    assert micro.lengths.tolist() == [3, 3] and micro.prompt_lengths.tolist() == [2, 1]
    assert micro.sampler_logprobs.tolist() == [0, 0, -1]
    assert micro.old_logprobs is not None and micro.old_logprobs.tolist() == [1, 1, 0]
    assert micro.advantages.tolist() == [0.0, 1.0]
    assert (batch.n_sequences, batch.n_tokens) == (2, 3)
    kinds = [micro.tokens, micro.lengths, micro.prompt_lengths, micro.sampler_logprobs, micro.old_logprobs]
    assert [a.dtype for a in kinds] == [np.int32] * 3 + [np.float32] * 2


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_counts_leave_out_what_the_objective_drops(bad):
    samples = [make_sample(0, 2, 3), make_sample(1, 2, 0), make_sample(2, 2, 4, bad=bad)]
    batch = pack(samples, ranks=1, tokens=100)
    assert (batch.n_sequences, batch.n_tokens) == (1, 3)
    assert batch.ranks[0][0].n_sequences == 3, "they travel along, to be counted as dropped"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_the_learner_itself_overflows_on_is_kept_back(bad):
    """Its gradient would be zero times infinity."""
    samples = [make_sample(0, 2, 3), make_sample(1, 2, 4)]
    samples[1] = replace(samples[1], old_logprobs=np.full(4, bad, np.float32))
    batch = pack(samples, ranks=2, tokens=100)
    assert (batch.n_sequences, batch.n_tokens, batch.n_kept_back) == (1, 3, 1)
    assert sum(micro.n_sequences for rank in batch.ranks for micro in rank) == 1
    assert len({len(rank) for rank in batch.ranks}) == 1


def test_counts_equal_the_objectives_own():
    import torch

    from qarl.packed import valid_sequences

    samples = [make_sample(i, 2, i % 4, bad=np.nan if i == 5 else None) for i in range(9)]
    batch = pack(samples, ranks=2, tokens=12)
    n_sequences = n_tokens = 0
    for micro in (m for rank in batch.ranks for m in rank if m.n_sequences):
        responses = torch.from_numpy(micro.lengths - micro.prompt_lengths)
        sequence = torch.repeat_interleave(torch.arange(len(responses)), responses)
        assert micro.old_logprobs is not None
        old, sampler = torch.from_numpy(micro.old_logprobs), torch.from_numpy(micro.sampler_logprobs)
        valid = valid_sequences(old, sampler, sequence, len(responses))
        n_sequences += int(valid.sum())
        n_tokens += int(responses[valid].sum())
    assert (batch.n_sequences, batch.n_tokens) == (n_sequences, n_tokens)


def test_fillers_complete_the_ranks():
    batch = pack([make_sample(0, 2, 3)], ranks=3, tokens=10)
    assert [[m.n_sequences for m in rank] for rank in batch.ranks] == [[1], [0], [0]]
    filler = batch.ranks[1][0]
    assert len(filler.tokens) == 0 and filler.n_response_tokens == 0 and filler.old_logprobs is not None


def test_no_samples_make_fillers_only():
    batch = pack([], ranks=2, tokens=10)
    assert (batch.n_sequences, batch.n_tokens) == (0, 0) and len(batch.ranks) == 2


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=20), st.integers(1, 3))
def test_scores_come_back_in_the_order_given(shapes, ranks):
    sequences = [np.arange(p + r, dtype=np.int32) + 1000 * i for i, (p, r) in enumerate(shapes)]
    batch, order = pack_to_score(sequences, ranks, 20, [p for p, _ in shapes])

    def responses(micro):  # as a learner would: one value a response token, here the token itself
        starts = np.cumsum(micro.lengths) - micro.lengths
        spans = [
            micro.tokens[s + p : s + n] for s, p, n in zip(starts, micro.prompt_lengths, micro.lengths, strict=True)
        ]
        return np.concatenate(spans).astype(np.float32) if spans else np.empty(0, np.float32)

    values = order.unpack([[responses(m) for m in rank] for rank in batch.ranks])
    assert [v.tolist() for v in values] == [s[p:].tolist() for s, (p, _) in zip(sequences, shapes, strict=True)]


def test_scores_of_another_shape_are_refused():
    _, order = pack_to_score([np.arange(5)], 1, 10)
    with pytest.raises(ValueError, match="3 values do not fit 4 response tokens"):
        order.unpack([[np.zeros(3, np.float32)]])
