"""The clipped surrogate of every objective: ratio, bounds, correction, normaliser, penalties, in that order.

Layout: see `qarl.packed`. Everything is computed in float64: T numbers cost nothing beside T × V logits, and bands of
3e-4 around a mean over thousands of tokens are worth it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from qarl.algorithm import Bounds, KLEstimator, Objective
from qarl.corrections import Corrected, correction_weights
from qarl.packed import LOG_RATIO_LIMIT, bounded_exp, lengths, segment_mean, valid_sequences

SUMS = {
    "loss": "what was minimised, penalties included",
    "tokens": "response tokens of valid responses",
    "sequences": "valid responses",
    "dropped": "responses left out: without tokens, or with a non-finite old or sampler log-prob",
    "units": "units of the ratio: tokens, or responses, whichever it is made of",
    "ratio": "sum over units of the ratio before clipping",
    "ratio_max": "largest ratio; the one entry that is combined by maximum",
    "positive": "units with A > 0; those with A = 0 have no gradient and count on neither side",
    "negative": "units with A < 0",
    "positive_high": "units with A > 0 above their bound",
    "negative_low": "units with A < 0 under their bound",
    "negative_high": "units with A < 0 above their bound",
    "correction_units": "units of the mismatch weight",
    "correction_high": "units whose mismatch weight exceeded the cap",
    "correction_low": "units whose mismatch weight fell under the floor",
    "kl": "sum over tokens of the KL estimate, nats; 0 without a reference",
    "kl_step": "sum over tokens of the k3 estimate of KL(published || current learner), nats",
    "entropy": "sum over tokens of the entropy, nats; 0 where none was given",
    "gradient": "sum over tokens of the L1 norm of the policy term's gradient at their logits: `logit_gradient`",
    "error_gradient": "what of it is that of error responses; the others below are likewise parts of those above",
    "error_units": "units of error responses",
    "error_ratio": "their ratio",
    "error_negative": "those with A < 0",
    "error_positive_high": "those with A > 0 above their bound",
    "error_negative_low": "those with A < 0 under their bound",
    "error_negative_high": "those with A < 0 above their bound",
}
"""What `surrogate` counts. All but `ratio_max` add up over micro-batches, ranks and optimizer steps."""
_PARTS = {
    "units": "",
    "ratio": "ratio",
    "negative": "negative",
    "positive_high": "clip_positive_high",
    "negative_low": "clip_negative_low",
    "negative_high": "clip_negative_high",
}
"""What is summed over error responses too -> its name among the metrics."""


def surrogate(
    logprobs: Tensor,
    *,
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    advantages: Tensor,
    sequence: Tensor,
    n_sequences: int,
    batch_sequences: int,
    batch_tokens: int,
    objective: Objective,
    reference_logprobs: Tensor | None = None,
    entropies: Tensor | None = None,
    errors: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one micro-batch, to be minimised (a scalar of logprobs' dtype), and its `SUMS` (0-d float64).

        loss = - Σ_t n_t [ w_t clip(r_t) A_t  -  kl_coefficient KL_t  +  entropy_coefficient H_t ]

    with r the ratio, clip its bounds, w the correction, n the normaliser. logprobs, entropies [T] with gradient;
    old_logprobs, sampler_logprobs, reference_logprobs [T]; advantages [B]; errors [B] bool, responses that are told apart in
    the sums alone; sequence, n_sequences as in `qarl.packed`.
    batch_sequences and batch_tokens count the VALID responses and their tokens in the whole optimizer step, over all
    micro-batches and ranks: so their losses ADD UP to the loss of the step, however it is split between responses.
    (An engine that averages gradients over ranks wants the loss times the number of ranks.)
    Responses that are not valid (`qarl.packed.valid_sequences`) contribute exactly nothing, and are counted. A
    non-finite log-prob of the current learner is a divergence: loss and gradient become NaN.
    """
    valid_B = valid_sequences(old_logprobs, sampler_logprobs, sequence, n_sequences)
    valid = valid_B[sequence]

    def of_valid(values: Tensor) -> Tensor:
        # Before any arithmetic: a NaN times a weight of zero is a NaN, in the backward too.
        return torch.where(valid, values.double(), 0.0)

    logprobs_T, old, sampler = of_valid(logprobs), of_valid(old_logprobs), of_valid(sampler_logprobs)
    advantages_T = of_valid(advantages[sequence])
    log_ratio = logprobs_T - old
    if objective.ratio == "sequence":
        log_ratio = segment_mean(log_ratio, sequence, n_sequences)[sequence]
    ratio = bounded_exp(log_ratio)
    low, high = clip_range(advantages_T, objective.bounds)
    correction = correction_weights(old, sampler, sequence, n_sequences, objective.correction)
    terms = correction.weights * ratio.clamp(low, high) * advantages_T
    weights = of_valid(normaliser_weights(objective, sequence, n_sequences, batch_sequences, batch_tokens))
    gradient = logit_gradient(weights * terms, log_ratio, low, high, logprobs_T, sequence, n_sequences, objective)

    reference, entropies = (None if given is None else of_valid(given) for given in (reference_logprobs, entropies))
    penalty, kl, entropy = penalties(logprobs_T, reference, entropies, objective)
    divergence = (logprobs_T - logprobs_T).detach()  # 0, or NaN: clamps hide an infinity, from the gradient too
    loss = (logprobs_T * divergence - weights * (terms - penalty)).sum()

    error = torch.zeros_like(valid) if errors is None else errors[sequence]
    sums = {"loss": loss, "dropped": (~valid_B).sum()}
    sums |= _unit_sums(ratio, low, high, advantages_T, correction, sequence, valid_B, objective, error)
    # Of the tokens of the published learner, as far as there is no mismatch: hence the estimate from its side.
    kl_step = kl_estimate(old, logprobs_T, "k3")
    parts = {"kl": kl, "kl_step": kl_step, "entropy": entropy, "gradient": gradient, "error_gradient": error * gradient}
    sums |= {name: values.sum() for name, values in parts.items()}
    return loss.to(logprobs.dtype), {name: sums[name].detach().double() for name in SUMS}


def clip_range(advantages: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """Smallest and largest ratio that carry gradient, [T], [T], by the sign of the advantage; 0 and inf: unbounded."""
    positive_high = math.inf if bounds.positive_high is None else 1 + bounds.positive_high
    negative_high = math.inf if bounds.negative_high is None else 1 + bounds.negative_high
    negative_low = 0.0 if bounds.negative_low is None else 1 - bounds.negative_low
    negative = advantages < 0
    low = torch.zeros_like(advantages).masked_fill(negative, negative_low)
    high = torch.full_like(advantages, positive_high).masked_fill(negative, negative_high)
    return low, high


@torch.no_grad()
def logit_gradient(
    terms: Tensor,
    log_ratio: Tensor,
    low: Tensor,
    high: Tensor,
    logprobs: Tensor,
    sequence: Tensor,
    n_sequences: int,
    objective: Objective,
) -> Tensor:
    """L1 norm of the policy term's gradient with respect to the logits of each token, [T] float64, at temperature 1.

    terms [T]: n_t w_t r_t A_t. Where r got through the clip this is the gradient with respect to log r, else that is 0; a
    response's log r spreads it evenly over its tokens. That of log p(y) with respect to the logits is onehot(y) - p, whose L1
    norm is 2 (1 - p(y)). So it is exact, without penalties, and where error tokens are the unlikely ones it shows. It is not the
    norm over weights, for which every response would need a backward of its own, and where gradients of tokens cancel.
    """
    ratio = bounded_exp(log_ratio)
    pull = terms * ((ratio >= low) & (ratio <= high) & (log_ratio.abs() <= LOG_RATIO_LIMIT))
    if objective.ratio == "sequence":
        pull = segment_mean(pull, sequence, n_sequences)[sequence]
    return pull.abs() * 2 * -torch.expm1(logprobs.clamp(max=0))  # rounding may leave p a little above 1


def penalties(
    logprobs: Tensor, reference_logprobs: Tensor | None, entropies: Tensor | None, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """What is taken from each token's term; its KL estimate, 0 where the objective has none; its entropy, 0 where none is given."""
    penalty = kl = torch.zeros_like(logprobs)
    if objective.kl_coefficient:
        assert reference_logprobs is not None, "kl_coefficient is not 0"
        kl = kl_estimate(logprobs, reference_logprobs, objective.kl_estimator)
        penalty = objective.kl_coefficient * kl
    if objective.entropy_coefficient:
        assert entropies is not None, "entropy_coefficient is not 0"
        penalty = penalty - objective.entropy_coefficient * entropies
    return penalty, kl, torch.zeros_like(logprobs) if entropies is None else entropies


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: KLEstimator) -> Tensor:
    """KL(current || reference) from one sample a token, [T] nats (http://joschu.net/blog/kl-approx.html)."""
    log_ratio = reference_logprobs - logprobs
    match estimator:
        case "k1":
            return -log_ratio
        case "k2":
            return log_ratio.square() / 2
        case "k3":
            return bounded_exp(log_ratio) - 1 - log_ratio


def normaliser_weights(
    objective: Objective, sequence: Tensor, n_sequences: int, batch_sequences: int, batch_tokens: int
) -> Tensor:
    """What each token's term is multiplied by, [T] float64. Counts are those of `surrogate`; 0 of them counts as 1."""
    tokens_T = lengths(sequence, n_sequences)[sequence].double()
    match objective.normaliser:
        case "token_mean":
            return torch.ones_like(tokens_T) / max(batch_tokens, 1)
        case "sequence_mean":
            return 1 / (tokens_T * max(batch_sequences, 1))
        case "constant":
            assert objective.constant_tokens is not None
            return torch.ones_like(tokens_T) / (max(batch_sequences, 1) * objective.constant_tokens)


def combine(parts: Sequence[Mapping[str, Tensor | float]]) -> dict[str, float]:
    """`SUMS` of micro-batches, ranks or optimizer steps -> `SUMS` of them together; the order does not matter."""
    rows = [torch.stack([torch.as_tensor(part[name]).double() for name in SUMS]).tolist() for part in parts]
    columns = zip(SUMS, zip(*rows, strict=True), strict=True) if rows else ((name, (0.0,)) for name in SUMS)
    return {name: largest(column) if name == "ratio_max" else math.fsum(column) for name, column in columns}


def largest(values: Iterable[float]) -> float:
    """NaN where one is."""
    return max(values, key=lambda v: (v != v, v))


def finalize(sums: Mapping[str, float]) -> dict[str, float]:
    """Combined `SUMS` -> metrics. Clip fractions are shares of the units of that sign; a share of nothing is 0, but nothing
    has no entropy."""

    def share(part: str, whole: str) -> float:
        return sums[part] / sums[whole] if sums[whole] else 0.0

    return {
        "clip/positive_high": share("positive_high", "positive"),
        "clip/negative_low": share("negative_low", "negative"),
        "clip/negative_high": share("negative_high", "negative"),
        "clip/mismatch_high": share("correction_high", "correction_units"),
        "clip/mismatch_low": share("correction_low", "correction_units"),
        "objective/loss": sums["loss"],
        "objective/ratio_mean": share("ratio", "units"),
        "objective/ratio_max": sums["ratio_max"],
        "objective/kl": share("kl", "tokens"),
        "objective/kl_step": share("kl_step", "tokens"),
        "objective/dropped_sequences": sums["dropped"],
        **({"entropy": sums["entropy"] / sums["tokens"]} if sums["tokens"] else {}),
        "error_tokens/gradient": share("error_gradient", "gradient"),
        **_error_metrics(sums),
    }


def _error_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """Error responses and the rest beside each other; of a side that has no unit, nothing."""
    of_errors = {name: sums[f"error_{name}"] for name in _PARTS}
    of_rest = {name: sums[name] - of_errors[name] for name in _PARTS}
    return {
        f"error_tokens/{side}{shown}": part[name] / part["units"]
        for side, part in (("", of_errors), ("rest_", of_rest))
        if part["units"]
        for name, shown in _PARTS.items()
        if shown
    }


@torch.no_grad()
def _unit_sums(
    ratio: Tensor,
    low: Tensor,
    high: Tensor,
    advantages: Tensor,
    correction: Corrected,
    sequence: Tensor,
    valid_B: Tensor,
    objective: Objective,
    error: Tensor,
) -> dict[str, Tensor]:
    token = valid_B[sequence]
    first = token & (sequence.diff(prepend=sequence.new_tensor([-1])) > 0)  # stands for its response: exact counts
    unit = token if objective.ratio == "token" else first
    correction_unit = token if objective.correction.level == "token" else first
    positive, negative = advantages > 0, advantages < 0
    parts = {
        "units": unit,
        "ratio": unit * ratio,
        "negative": unit & negative,
        "positive_high": unit & positive & (ratio > high),
        "negative_low": unit & negative & (ratio < low),
        "negative_high": unit & negative & (ratio > high),
    }
    return {
        **{name: values.sum() for name, values in parts.items()},
        **{f"error_{name}": (error * values).sum() for name, values in parts.items()},
        "tokens": token.sum(),
        "sequences": valid_B.sum(),
        "ratio_max": torch.cat([ratio * token, ratio.new_zeros(1)]).max(),
        "positive": (unit & positive).sum(),
        "correction_units": correction_unit.sum(),
        "correction_high": (correction_unit & correction.high).sum(),
        "correction_low": (correction_unit & correction.low).sum(),
    }
