"""How far the sampler that wrote the tokens is from the learner that was published: one step's statistics."""

import torch
from torch import Tensor

from qarl.packed import bounded_exp, segment_sum, valid_sequences


def mismatch_statistics(
    old_logprobs: Tensor, sampler_logprobs: Tensor, sequence: Tensor, n_sequences: int
) -> dict[str, float]:
    """Metrics of Δ = old - sampler over all response tokens of a step. [T], [T], [T] int64; computed in float64.

    With w = e^Δ and tokens drawn from the sampler (names as in verl's rollout correction):
    k1 = mean(-Δ) and k3 = mean(w - 1 - Δ) estimate KL(sampler || learner) in nats; chi2 = mean(w²) - 1.
    ess = (Σw)² / (n Σw²), the share of samples that importance weights would leave effective, 1 when they are equal:
    of tokens, and of whole responses with the product of their tokens' weights. pearson correlates e^old and e^sampler.
    w is held within e^±20. Non-finite tokens are left out and counted, their responses left out of ess_sequence.
    With no token left there is no mismatch: zeros, and ones for ess, pearson and ratio_max.
    """
    old, sampler = old_logprobs.double(), sampler_logprobs.double()
    finite = torch.isfinite(old) & torch.isfinite(sampler)
    whole = valid_sequences(old, sampler, sequence, n_sequences)
    delta_all = torch.where(finite, old - sampler, 0.0)
    old, sampler, delta = old[finite], sampler[finite], delta_all[finite]
    weights = bounded_exp(delta)
    return {
        "mismatch/mean_abs": _mean(delta.abs()),
        "mismatch/max_abs": _max(delta.abs(), empty=0.0),
        "mismatch/k1": _mean(-delta),
        "mismatch/k3": _mean(weights - 1 - delta),
        "mismatch/chi2": _mean(weights.square() - 1),
        "mismatch/ess_token": _effective_share(delta),
        "mismatch/ess_sequence": _effective_share(segment_sum(delta_all, sequence, n_sequences)[whole]),
        "mismatch/pearson": _pearson(old.exp(), sampler.exp()),
        "mismatch/ratio_max": _max(weights, empty=1.0),
        "mismatch/tokens": float(len(delta)),
        "mismatch/dropped_tokens": float((~finite).sum()),
        "mismatch/dropped_share": _mean((~finite).double()),
    }


def _mean(values: Tensor) -> float:
    return values.mean().item() if len(values) else 0.0


def _max(values: Tensor, *, empty: float) -> float:
    return values.max().item() if len(values) else empty


def _effective_share(log_weights: Tensor) -> float:
    """(Σw)² / (n Σw²) by log-sum-exp, which neither overflows nor needs a clamp."""
    if not len(log_weights):
        return 1.0
    return (2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)).exp().item() / len(log_weights)


def _pearson(x: Tensor, y: Tensor) -> float:
    """Correlation; where one side is constant it is not defined: 1 if both sides are equal, else 0."""
    if torch.equal(x, y):
        return 1.0
    x, y = x - x[0], y - y[0]  # exactly 0 where constant; the mean of equal numbers may differ from them
    x, y = x - x.mean(), y - y.mean()
    scale = (x.norm() * y.norm()).item()
    return (x @ y).item() / scale if scale else 0.0
