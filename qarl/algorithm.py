"""What an objective consists of, as plain data without torch: the config tree holds it, `qarl.objectives` computes it.

Every published objective here is a setting of the same five pieces (ratio, bounds, correction, normaliser, penalties);
the constructors at the end say which, each in terms of the one before it.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from qarl.errors import ConfigError

AdvantageKind = Literal["grpo", "dr_grpo", "rloo"]
RatioLevel = Literal["token", "sequence"]
CorrectionKind = Literal["none", "tis", "mis"]
CorrectionLevel = Literal["token", "sequence", "sequence_sum"]
Normaliser = Literal["token_mean", "sequence_mean", "constant"]
KLEstimator = Literal["k1", "k2", "k3"]


def _check_positive(key: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{key}: must be finite and above 0, got {value}")


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{key}: {value!r} is not one of {list(choices)}")


@dataclass(frozen=True)
class Bounds:
    """Where the ratio r stops carrying gradient, by the sign of the advantage. None: that side is unbounded.

    A positive advantage has no lower bound: the outer `min` of PPO makes that side inactive, in every objective here.
    """

    positive_high: float | None
    """A >= 0: the ratio counts as at most 1 + this. PPO's upper clip."""

    negative_low: float | None
    """A < 0: the ratio counts as at least 1 - this. PPO's lower clip."""

    negative_high: float | None
    """A < 0: the ratio counts as at most 1 + this; dual clip's constant is c = 1 + this. Plain PPO: None."""

    def __post_init__(self) -> None:
        for name in ("positive_high", "negative_low", "negative_high"):
            value = getattr(self, name)
            if value is not None:
                _check_positive(f"algorithm.objective.bounds.{name}", value)
        if self.negative_low is not None and self.negative_low > 1:
            raise ConfigError(f"algorithm.objective.bounds.negative_low: must be at most 1, got {self.negative_low}")


@dataclass(frozen=True)
class Correction:
    """How each sample is reweighted by w = learner-at-publish / sampler, the two policies' mismatch."""

    kind: CorrectionKind = "none"
    """none: w = 1. tis (truncated importance sampling): min(w, cap). mis (masked): w in [floor, cap], else 0."""

    level: CorrectionLevel = "token"
    """What w is made of: one token; the geometric mean over the response; or the product over it (sequence_sum)."""

    cap: float = 2.0
    """Largest weight: tis truncates there, mis masks above it. Not read by none."""

    floor: float = 0.0
    """Smallest weight that mis keeps. Read by mis alone."""

    def __post_init__(self) -> None:
        _check_choice("algorithm.objective.correction.kind", self.kind, get_args(CorrectionKind))
        _check_choice("algorithm.objective.correction.level", self.level, get_args(CorrectionLevel))
        _check_positive("algorithm.objective.correction.cap", self.cap)
        if not 0 <= self.floor <= self.cap:
            raise ConfigError(
                f"algorithm.objective.correction.floor: must lie between 0 and cap = {self.cap}, got {self.floor}"
            )
        if self.kind != "mis" and self.floor != 0:
            raise ConfigError(
                f"algorithm.objective.correction.floor: read by kind 'mis' alone, but kind is {self.kind!r}, got {self.floor}"
            )


@dataclass(frozen=True)
class Objective:
    """One policy-gradient objective. `qarl.objectives.surrogate` states the formula."""

    ratio: RatioLevel
    """Current over published learner: of each token, or of the response as geometric mean over its tokens."""

    bounds: Bounds
    """Trust region of that ratio."""

    normaliser: Normaliser
    """What the sum over tokens is divided by: all tokens of the batch (token_mean); the response's tokens, then the
    number of responses (sequence_mean); the number of responses times `constant_tokens` (constant, Dr. GRPO)."""

    correction: Correction = Correction()
    """Weight against the mismatch between learner and sampler."""

    kl_coefficient: float = 0.0
    """Weight of the KL penalty against the reference policy; 0 needs no reference."""

    kl_estimator: KLEstimator = "k3"
    """With q = log(reference / current): k1 = -q, k2 = q^2 / 2, k3 = e^q - 1 - q. On policy the gradient of k1 has
    mean 0, so that as a penalty it only adds noise; that of k2 is the gradient of the KL divergence."""

    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""

    constant_tokens: int | None = None
    """Needed by normaliser `constant` and read by it alone: tokens of the longest response that sampling allows."""

    def __post_init__(self) -> None:
        _check_choice("algorithm.objective.ratio", self.ratio, get_args(RatioLevel))
        _check_choice("algorithm.objective.normaliser", self.normaliser, get_args(Normaliser))
        _check_choice("algorithm.objective.kl_estimator", self.kl_estimator, get_args(KLEstimator))
        for name in ("kl_coefficient", "entropy_coefficient"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"algorithm.objective.{name}: must be finite and at least 0, got {value}")
        if self.normaliser == "constant" and (self.constant_tokens is None or self.constant_tokens < 1):
            raise ConfigError(
                "algorithm.objective.constant_tokens: normaliser 'constant' needs a positive one, "
                f"got {self.constant_tokens}"
            )
        if self.normaliser != "constant" and self.constant_tokens is not None:
            raise ConfigError(
                "algorithm.objective.constant_tokens: read by normaliser 'constant' alone, but normaliser is "
                f"{self.normaliser!r}, got {self.constant_tokens}"
            )


def icepop(alpha: float = 0.5, beta: float = 5.0) -> Correction:
    """IcePop: token-level masking outside [alpha, beta] (defaults as published and in verl's rollout correction)."""
    return Correction(kind="mis", level="token", cap=beta, floor=alpha)


def dapo(low: float = 0.2, high: float = 0.28) -> Objective:
    """DAPO (arXiv 2503.14476): token ratio, clip-higher, mean over all tokens of the batch."""
    bounds = Bounds(positive_high=high, negative_low=low, negative_high=None)
    return Objective(ratio="token", bounds=bounds, normaliser="token_mean")


def grpo(clip: float = 0.2) -> Objective:
    """GRPO (arXiv 2402.03300): DAPO with equal clips, each response averaged over its own tokens first."""
    return replace(dapo(low=clip, high=clip), normaliser="sequence_mean")


def dr_grpo(constant_tokens: int, clip: float = 0.2) -> Objective:
    """Dr. GRPO (arXiv 2503.20783): GRPO without its bias towards short right and long wrong responses.

    Its advantages have no division by the deviation: `algorithm.advantage=dr_grpo`.
    """
    return replace(grpo(clip), normaliser="constant", constant_tokens=constant_tokens)


def dual_clip(clip: float = 0.2, c: float = 3.0) -> Objective:
    """Dual-clip PPO (arXiv 1912.09729): GRPO's clip, and for A < 0 max(min(r A, clip(r) A), c A) with c > 1."""
    if not c > 1:
        raise ConfigError(
            f"algorithm.objective.bounds.negative_high: dual clip needs c = 1 + negative_high > 1, got {c}"
        )
    objective = grpo(clip)
    return replace(objective, bounds=replace(objective.bounds, negative_high=c - 1))


def gspo(low: float = 3e-4, high: float = 4e-4) -> Objective:
    """GSPO (arXiv 2507.18071): GRPO on the length-normalised ratio of the whole response."""
    bounds = Bounds(positive_high=high, negative_low=low, negative_high=None)
    return Objective(ratio="sequence", bounds=bounds, normaliser="sequence_mean")


def tbpo(
    positive_high: float = 4e-4, negative_low: float = 3e-4, negative_high: float = 7e-4, cap: float = 2.0
) -> Objective:
    """Trust-Band Policy Optimization (QaRL, arXiv 2604.07853). For a response i of L_i tokens with advantage A_i:

        log r_i = mean_t [logprob_t - old_logprob_t]            current over published learner, both aligned
        log w_i = mean_t [old_logprob_t - sampler_logprob_t]    constant
        A_i >= 0:  r~_i = min(r_i, 1 + positive_high)
        A_i <  0:  r~_i = clip(r_i, 1 - negative_low, 1 + negative_high)
        maximise   mean_i min(w_i, cap) r~_i A_i

    A response outside its bound has gradient exactly zero. It is GSPO plus a ceiling for negative responses (for A < 0:
    dual clip with c = 1 + negative_high on GSPO's ratio) plus truncated importance weights per response.

    Reported of the paper: sequence level and dual clipping for negatives (its abstract); geometric means, that a
    response outside the band is dropped, and the four default values (second-hand summaries; 4e-4 and 3e-4 are also
    GSPO's). Inferred, not confirmed: the formula as a whole, clipping r and not log r, a one-sided cap on w, that w
    alone drops no response, the mean over responses, and that there is neither a KL nor an entropy term.
    """
    objective = gspo(low=negative_low, high=positive_high)
    return replace(
        objective,
        bounds=replace(objective.bounds, negative_high=negative_high),
        correction=Correction(kind="tis", level="sequence", cap=cap),
    )
