"""Packing: whole sequences into micro-batches under a token budget, equally many on every rank. No torch.

    batch, order = pack_to_score(sequences, ranks=2, tokens=4096)
    logprobs = order.unpack(learner.score(batch))           # one array a sequence, in the order given

Deterministic: the same sequences in the same order give the same micro-batches.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qarl.errors import ConfigError
from qarl.records import MicroBatch, MiniBatch, Sample

Bins = list[list[int]]


@dataclass(frozen=True)
class Order:
    """Where each sequence went."""

    ranks: tuple[tuple[tuple[int, ...], ...], ...]
    """[rank][micro-batch] -> indices of its sequences, in the order they are packed."""
    response_lengths: np.ndarray
    """int64 [number of sequences]."""

    def unpack(self, packed: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
        """[rank][micro-batch] -> values of its response tokens, to one array a sequence, in their original order."""
        values: list[np.ndarray] = [np.empty(0, np.float32)] * len(self.response_lengths)
        for rank, arrays in zip(self.ranks, packed, strict=True):
            for indices, array in zip(rank, arrays, strict=True):
                lengths = self.response_lengths[list(indices)]
                if lengths.sum() != len(array):
                    raise ValueError(f"{len(array)} values do not fit {lengths.sum()} response tokens")
                for index, part in (
                    zip(indices, np.split(array, np.cumsum(lengths)[:-1]), strict=True) if indices else ()
                ):
                    values[index] = part
        return values


def pack(samples: Sequence[Sample], ranks: int, tokens: int) -> MiniBatch:
    """The samples of one optimizer step. They are scored, or of none the old log-probs are looked at.

    Sequences that cannot be learnt from (no response, a non-finite sampler log-prob) travel along, so that the objective counts
    them as dropped, but not in `n_sequences` and `n_tokens`. One whose old log-probs are not finite is kept back: the learner's
    own forward of it overflows, and a gradient of zero times infinity is none. Raises `ConfigError` naming `learner.tokens`
    where a sequence is longer than that.
    """
    asked = len(samples)
    samples = [s for s in samples if s.old_logprobs is None or np.isfinite(s.old_logprobs).all()]
    lengths = [len(s.prompt_tokens) + len(s.completion.tokens) for s in samples]
    valid = [s for s in samples if _is_valid(s)]
    return MiniBatch(
        ranks=tuple(
            tuple(_micro_batch([samples[i] for i in bin]) for bin in rank) for rank in spread(lengths, ranks, tokens)
        ),
        n_sequences=len(valid),
        n_tokens=sum(len(s.completion.tokens) for s in valid),
        n_kept_back=asked - len(samples),
    )


def pack_to_score(
    sequences: Sequence[np.ndarray], ranks: int, tokens: int, prompt_lengths: Sequence[int] | None = None
) -> tuple[MiniBatch, Order]:
    """Sequences whose tokens after the prompt are to be scored; the prompt is the first token where nothing else is said."""
    prompts = np.asarray(prompt_lengths if prompt_lengths is not None else [1] * len(sequences), np.int32)
    lengths = np.array([len(s) for s in sequences], np.int32)
    bins = spread(lengths.tolist(), ranks, tokens)
    responses = (lengths - prompts).astype(np.int64)

    def micro(bin: list[int]) -> MicroBatch:
        return MicroBatch(
            tokens=_join([sequences[i] for i in bin], np.int32),
            lengths=lengths[bin],
            prompt_lengths=prompts[bin],
            sampler_logprobs=np.zeros(int(responses[bin].sum()), np.float32),
            old_logprobs=None,
            advantages=np.zeros(len(bin), np.float32),
        )

    batch = MiniBatch(
        ranks=tuple(tuple(micro(bin) for bin in rank) for rank in bins),
        n_sequences=int((responses > 0).sum()),
        n_tokens=int(responses.sum()),
    )
    return batch, Order(tuple(tuple(tuple(bin) for bin in rank) for rank in bins), responses)


def spread(lengths: Sequence[int], ranks: int, tokens: int) -> list[Bins]:
    """[rank][micro-batch] -> indices of its sequences, in ascending order; equally many micro-batches a rank.

    As few as first-fit-decreasing needs, rounded up to the ranks, then filled evenly. Micro-batches of the same place have
    about the same load on all ranks, because they run in lock step; ones left empty are fillers. At least one a rank.
    """
    for length in lengths:
        if length > tokens:
            raise ConfigError(f"learner.tokens: {tokens} cannot hold a sequence of {length} tokens")
    longest_first = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    first_fit = _first_fit(lengths, longest_first, tokens)
    n_bins = max(-(-len(first_fit) // ranks), 1) * ranks
    bins = _even(lengths, longest_first, n_bins, tokens) or first_fit + [[] for _ in range(n_bins - len(first_fit))]
    bins.sort(key=lambda bin: (-sum(lengths[i] for i in bin), bin))
    return [[sorted(bin) for bin in bins[rank::ranks]] for rank in range(ranks)]


def _first_fit(lengths: Sequence[int], order: list[int], tokens: int) -> Bins:
    bins: Bins = []
    room: list[int] = []
    for i in order:
        place = next((b for b, free in enumerate(room) if free >= lengths[i]), None)
        if place is None:
            place = len(bins)
            bins.append([])
            room.append(tokens)
        bins[place].append(i)
        room[place] -= lengths[i]
    return bins


def _even(lengths: Sequence[int], order: list[int], n_bins: int, tokens: int) -> Bins | None:
    """Each sequence, longest first, to the bin with the least in it; `None` where that breaks the budget."""
    bins: Bins = [[] for _ in range(n_bins)]
    load = [(0, b) for b in range(n_bins)]
    for i in order:
        least, place = heapq.heappop(load)
        if least + lengths[i] > tokens:
            return None
        bins[place].append(i)
        heapq.heappush(load, (least + lengths[i], place))
    return bins


def _micro_batch(samples: Sequence[Sample]) -> MicroBatch:
    prompts = np.array([len(s.prompt_tokens) for s in samples], np.int32)
    responses = np.array([len(s.completion.tokens) for s in samples], np.int32)
    scored = all(s.old_logprobs is not None for s in samples)
    return MicroBatch(
        tokens=_join([part for s in samples for part in (s.prompt_tokens, s.completion.tokens)], np.int32),
        lengths=prompts + responses,
        prompt_lengths=prompts,
        sampler_logprobs=_join([s.completion.logprobs for s in samples], np.float32),
        old_logprobs=_join([s.old_logprobs for s in samples if s.old_logprobs is not None], np.float32)
        if scored
        else None,
        advantages=np.array([s.advantage for s in samples], np.float32),
        errors=np.array([s.is_error for s in samples], bool),
    )


def _is_valid(sample: Sample) -> bool:
    """Whether the objective keeps it: see `qarl.packed.valid_sequences`."""
    logprobs = [sample.completion.logprobs, *([] if sample.old_logprobs is None else [sample.old_logprobs])]
    return len(sample.completion.tokens) > 0 and all(np.isfinite(values).all() for values in logprobs)


def _join(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.empty(0, dtype)
