"""Weights against the mismatch between the learner that was published and the sampler that wrote the tokens."""

from typing import NamedTuple

import torch
from torch import Tensor

from qarl.algorithm import Correction
from qarl.packed import bounded_exp, segment_mean, segment_sum


class Corrected(NamedTuple):
    """Result of `correction_weights`, all [T], without gradient."""

    weights: Tensor
    """float64, what each token's term is multiplied by."""

    high: Tensor
    """bool: w exceeded the cap (truncated by tis, masked by mis)."""

    low: Tensor
    """bool: w fell under the floor (masked by mis)."""


@torch.no_grad()
def correction_weights(
    old_logprobs: Tensor, sampler_logprobs: Tensor, sequence: Tensor, n_sequences: int, correction: Correction
) -> Corrected:
    """Importance weight w = exp(old - sampler) of each token, truncated or masked. Inputs [T], finite.

    Level "token": of that token. "sequence": geometric mean over the response. "sequence_sum": product over the
    response, the unbiased weight, whose variance grows with length. Source: verl's rollout correction (which truncates
    the token and the product, and masks on token, product or mean); IcePop is `qarl.algorithm.icepop`.
    A masked token keeps its place in the normaliser: the batch is not renormalised to what is left.
    """
    log_ratio = old_logprobs.double() - sampler_logprobs.double()
    match correction.level:
        case "token":
            ratio = bounded_exp(log_ratio)
        case "sequence":
            ratio = bounded_exp(segment_mean(log_ratio, sequence, n_sequences))[sequence]
        case "sequence_sum":
            ratio = bounded_exp(segment_sum(log_ratio, sequence, n_sequences))[sequence]
    high, low = ratio > correction.cap, ratio < correction.floor
    match correction.kind:
        case "none":
            nothing = torch.zeros_like(high)
            return Corrected(torch.ones_like(ratio), nothing, nothing)
        case "tis":
            return Corrected(ratio.clamp(max=correction.cap), high, low)
        case "mis":
            return Corrected(ratio.masked_fill(high | low, 0.0), high, low)
