"""Sums over packed responses: T tokens of B responses end to end, `sequence` [T] int64 naming each token's response.

`sequence` is sorted and holds 0..B-1; a response without tokens does not occur in it.
"""

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0  # e^20 = 4.9e8: beyond any ratio that means something, and its square is far from overflow


def lengths(sequence: Tensor, n_sequences: int) -> Tensor:
    """Tokens of each response: [T] -> [B] int64, zeros included."""
    return torch.bincount(sequence, minlength=n_sequences)


def segment_sum(values: Tensor, sequence: Tensor, n_sequences: int) -> Tensor:
    """Sum over each response's tokens: [T] -> [B]; 0 where it has none."""
    return values.new_zeros(n_sequences).index_add(0, sequence, values)


def segment_mean(values: Tensor, sequence: Tensor, n_sequences: int) -> Tensor:
    """Mean over each response's tokens: [T] -> [B]; 0 where it has none."""
    return segment_sum(values, sequence, n_sequences) / lengths(sequence, n_sequences).clamp(min=1)


def valid_sequences(old_logprobs: Tensor, sampler_logprobs: Tensor, sequence: Tensor, n_sequences: int) -> Tensor:
    """Responses that can be learnt from: [T], [T] -> [B] bool. False for no tokens, or any non-finite log-prob."""
    finite = torch.isfinite(old_logprobs) & torch.isfinite(sampler_logprobs)
    broken = segment_sum((~finite).long(), sequence, n_sequences)
    return (lengths(sequence, n_sequences) > 0) & (broken == 0)


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp, with the argument held in ±LOG_RATIO_LIMIT; beyond it the gradient is zero. NaN stays NaN."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
