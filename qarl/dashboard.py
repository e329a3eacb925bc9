"""The panels of a run, once: the W&B workspace and `report.html` are both drawn from `SECTIONS`.

The responses of the samples follow the last section in both; they are texts, not charts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Line:
    """One metric in a chart."""

    metric: str
    """A name in `qarl.metrics.METRICS`."""
    label: str
    style: Literal["line", "smooth", "peak", "points"] = "line"
    """`smooth`: noisy, drawn with a running mean. `peak`: a largest value, so steps drawn as one show their largest.
    `points`: measured now and then."""


@dataclass(frozen=True)
class Chart:
    """Lines over steps, on one axis."""

    title: str
    hint: str
    """Unit, and what healthy looks like, in one line."""
    lines: tuple[Line, ...]
    scale: Literal["linear", "log", "percent"] = "linear"
    stacked: bool = False
    """The lines are parts of a whole."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(line.metric for line in self.lines)


@dataclass(frozen=True)
class Section:
    title: str
    charts: tuple[Chart, ...]


def _seconds(prefix: str, *stages: str) -> tuple[Line, ...]:
    """`time/sample_s` is `sample`."""
    return tuple(Line(f"{prefix}/{stage}_s", stage) for stage in stages)


def _clipped(prefix: str) -> tuple[Line, ...]:
    sides = (("positive_high", "A > 0, above"), ("negative_low", "A < 0, below"), ("negative_high", "A < 0, above"))
    return tuple(Line(prefix + side, label) for side, label in sides)


OVERVIEW = Section(
    "Overview",
    (
        Chart(
            "Reward and held-out accuracy",
            "Both should rise; reward alone rising is a reward that is gamed.",
            (
                Line("reward/mean", "reward, mean of the step", "smooth"),
                Line("accuracy/heldout", "held-out accuracy", "points"),
            ),
        ),
        Chart(
            "Spread of rewards",
            "Reward of the step's responses. No spread: nothing to learn from.",
            (
                Line("reward/std", "standard deviation", "smooth"),
                Line("reward/max", "highest", "peak"),
                Line("reward/min", "lowest"),
            ),
        ),
        Chart(
            "Flat groups and timeouts",
            "Share of groups whose rewards are all the same (near 100%: too hard or too easy), of rewards that timed out.",
            (Line("reward/flat_groups", "flat groups", "smooth"), Line("reward/timeout_share", "timed out", "peak")),
            "percent",
        ),
        Chart(
            "Entropy",
            "Nats a token. Falling to zero: collapse. Rising late: error tokens.",
            (Line("entropy", "entropy"),),
        ),
        Chart(
            "Response length",
            "Tokens. Healthy: below the limit of rollout.sampling.max_tokens.",
            (Line("length/mean", "mean"), Line("length/max", "longest", "peak")),
        ),
        Chart(
            "Gradient norm",
            "Before clipping; log axis. Healthy: no peaks that grow.",
            (Line("grad_norm", "largest of the step", "peak"),),
            "log",
        ),
        Chart(
            "Loss", "Penalties included. It need not fall: reward is the measure.", (Line("objective/loss", "loss"),)
        ),
        Chart("KL of the step", "Nats a token. Healthy: small and steady.", (Line("objective/kl_step", "KL"),)),
        Chart("Learning rate", "Of the step's last update.", (Line("lr", "learning rate"),)),
        Chart(
            "Failures",
            "Counts; all zero is healthy.",
            (
                Line("reward/timeouts", "rewards that timed out", "peak"),
                Line("reward/crashes", "rewards that crashed", "peak"),
                Line("objective/dropped_sequences", "responses left out", "peak"),
                Line("mismatch/dropped_tokens", "tokens not comparable", "peak"),
                Line("engine/restarts", "engine restarts so far", "peak"),
            ),
        ),
        Chart(
            "Held-out responses without a reward",
            "Count, each a wrong answer to the held-out accuracy; zero is healthy.",
            (Line("accuracy/unscored", "without a reward", "points"),),
        ),
    ),
)

MISMATCH = Section(
    "Sampler and learner: mismatch",
    (
        Chart(
            "Mismatch",
            "|learner − sampler| log-prob of the sampled tokens, nats; log axis. Flat is good.",
            (Line("mismatch/mean_abs", "mean"), Line("mismatch/max_abs", "largest", "peak")),
            "log",
        ),
        Chart(
            "Effective sample size",
            "Share of the sample that importance weights would leave; 100% when both sides agree.",
            (Line("mismatch/ess_token", "of tokens"), Line("mismatch/ess_sequence", "of responses")),
            "percent",
        ),
        Chart(
            "KL of sampler and learner",
            "Nats a token, two estimates. Near zero and flat is good.",
            (Line("mismatch/k1", "k1, unbiased"), Line("mismatch/k3", "k3, never negative")),
        ),
        Chart(
            "Chi-squared divergence",
            "Mean squared importance weight minus 1; log axis. Rising: a few tokens outweigh the rest.",
            (Line("mismatch/chi2", "chi-squared", "peak"),),
            "log",
        ),
        Chart(
            "Correlation",
            "Of the two sides' probabilities; 1 when they agree.",
            (Line("mismatch/pearson", "pearson"),),
        ),
        Chart(
            "Largest importance weight",
            "Of a token, learner over sampler; 1 when both sides agree.",
            (Line("mismatch/ratio_max", "largest of the step", "peak"),),
            "log",
        ),
    ),
)

CLIPPING = Section(
    "Clipping by sign and side",
    (
        Chart(
            "Clip fractions",
            "Share without gradient, by sign of the advantage A and side of the bound. Healthy: small and steady.",
            _clipped("clip/"),
            "percent",
        ),
        Chart(
            "Mismatch weights at their bounds",
            "Share of units. Rising: the correction works hard, so the mismatch grows.",
            (Line("clip/mismatch_high", "above the cap"), Line("clip/mismatch_low", "below the floor")),
            "percent",
        ),
        Chart(
            "Ratio of the updates",
            "Current over published learner, before clipping. The mean stays near 1.",
            (Line("objective/ratio_mean", "mean"), Line("objective/ratio_max", "largest", "peak")),
        ),
    ),
)

ERROR_TOKENS = Section(
    "Error tokens",
    (
        Chart(
            "Loops and garbled text",
            "Share: loops of repeated tokens and garbled text, which low-bit policies fall into. Healthy: near zero.",
            (
                Line("error_tokens/repetition_rate", "tokens in loops"),
                Line("error_tokens/garbling_rate", "characters garbled"),
                Line("error_tokens/share", "responses mostly loops or garbled"),
                Line("length/truncated", "responses cut off"),
            ),
            "percent",
        ),
        Chart(
            "Gradient of error responses",
            "Their share of the policy term's gradient. Healthy: not above their share of responses.",
            (Line("error_tokens/gradient", "share of the gradient"),),
            "percent",
        ),
        Chart(
            "Ratio, error and other responses",
            "Mean of current over published learner. Apart: error responses drift faster.",
            (Line("error_tokens/ratio", "error responses"), Line("error_tokens/rest_ratio", "the others")),
        ),
        Chart(
            "A < 0, error and other responses",
            "Share of units. Healthy: error responses are punished.",
            (Line("error_tokens/negative", "error responses"), Line("error_tokens/rest_negative", "the others")),
            "percent",
        ),
        Chart("Clip fractions of error responses", "Share of units.", _clipped("error_tokens/clip_"), "percent"),
        Chart("Clip fractions of the others", "Share of units.", _clipped("error_tokens/rest_clip_"), "percent"),
    ),
)

GUARD = Section(
    "Guard",
    (
        Chart(
            "Warnings and corrections",
            "Counts of the step; all zero is healthy.",
            (
                Line("guard/warnings", "limits of guard.warn passed", "peak"),
                Line("guard/corrections", "limits of guard.correct passed", "peak"),
                Line("guard/left_out", "responses left out", "peak"),
                Line("guard/skipped_updates", "updates skipped", "peak"),
                Line("guard/read_back", "sync compared every tensor", "peak"),
            ),
        ),
        Chart(
            "Entropy drift",
            "Factor from the run's first step, up or down. Healthy: near 1.",
            (Line("guard/entropy_drift", "entropy drift", "peak"),),
        ),
    ),
)

SYNC = Section(
    "Weight sync",
    (
        Chart(
            "Inside a weight sync",
            "Seconds of each sync, stacked; stages of learner and engine may overlap.",
            _seconds("sync", "gather", "quantize", "pack", "transfer", "wait", "wake", "load", "canary", "verify"),
            stacked=True,
        ),
        Chart("Sync in all", "Seconds, proof included. Healthy: flat.", (Line("sync/total_s", "whole sync"),)),
        Chart("Bytes", "GB that travelled. Healthy: the same at every sync.", (Line("sync/gb", "GB"),)),
        Chart(
            "Canary",
            "Mean |engine − learner| log-prob of the canaries, nats a token; log axis. Flat is good.",
            (Line("sync/canary", "canaries"),),
            "log",
        ),
        Chart(
            "Served weights",
            "Largest |served − published| weight over the tensor's largest. Zero: the very codes are served.",
            (Line("sync/tile_error", "largest error", "peak"),),
        ),
    ),
)

TIME = Section(
    "Where the seconds went",
    (
        Chart(
            "Time by stage",
            "Seconds of each step, stacked. Sampling and learning should be most of it.",
            _seconds("time", "publish", "sample", "reward", "score", "learn", "log", "checkpoint", "evaluate", "other"),
            stacked=True,
        ),
        Chart(
            "Inside learning",
            "Seconds of each step, stacked.",
            _seconds("learn", "forward", "backward", "optimizer"),
            stacked=True,
        ),
        Chart(
            "Speed",
            "Sampled tokens over the time of the whole step. Healthy: flat where lengths are.",
            (Line("tokens_per_s", "tokens/s"),),
        ),
        Chart("A step", "Seconds of the whole step.", (Line("time/step_s", "step"),)),
        Chart("Tokens", "Sampled in the step.", (Line("tokens", "tokens"),)),
    ),
)

SECTIONS = (OVERVIEW, MISMATCH, CLIPPING, ERROR_TOKENS, GUARD, SYNC, TIME)
SAMPLES = "Responses"
"""Title of what follows them."""
