"""Watches a run: says early what is off, corrects what can be, and stops when the numbers no longer mean anything.

A step asks in this order, and every answer is said with what was seen, its usual cause and what to change:

    leaves_out_timeouts     correct  timeouts       those responses are left out of their groups instead of counting as wrong
    trusts                  correct  mismatch, ess  the rollout is not learnt from; the next sync reads every quantized tensor back
    goes_on                 correct  kl, grad_norm  after an optimizer step: the rest of the rollout's mini-batches is skipped
    look                    warn     all            said once, when a row of steps beyond the limit begins
    enforce                 stop     all            `DivergenceError`: NaN or infinity at once, else after guard.patience steps, be
                                                    it beyond a limit or without a rollout that was learnt from
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from qarl.config import GuardConfig
from qarl.errors import DivergenceError
from qarl.measure import step_kl
from qarl.objectives import largest
from qarl.records import UpdateStats


class Watch(NamedTuple):
    """What one limit is about."""

    metric: str
    cause: str
    """What usually makes it exceed the limit."""
    change: str
    below: bool = False
    """The limit is the least that is right, not the most."""


WATCHES = {
    "mismatch": Watch(
        "mismatch/mean_abs",
        "the engine serves other weights or scales than the learner computes with, or the learner does not compute what the "
        "engine serves (learner.backend=none)",
        "raise sync.tiles and sync.canaries, lower sync.tile_tolerance and sync.canary_tolerance: the proof of a sync names the "
        "tensor; use learner.backend=auto",
    ),
    "ess": Watch(
        "mismatch/ess_token",
        "a few tokens have probabilities that engine and learner do not agree on at all: a damaged layer or router, or error "
        "tokens, which are unlikely to both",
        "look at mismatch/max_abs and error_tokens/share; bound the weights with algorithm.objective.correction; use "
        "learner.backend=auto",
        below=True,
    ),
    "kl": Watch(
        "objective/kl_step",
        "the updates of one rollout move the policy far: the learning rate is too high, or algorithm.mini_batches too many",
        "lower learner.optimizer.lr or algorithm.mini_batches, add learner.optimizer.warmup, or choose narrower "
        "algorithm.objective.bounds",
    ),
    "grad_norm": Watch(
        "grad_norm",
        "the learning rate is too high, or a few responses with huge ratios dominate the update",
        "lower learner.optimizer.lr or add learner.optimizer.warmup, or choose an objective that bounds negative responses "
        "(algorithm=tbpo)",
    ),
    "entropy_drift": Watch(
        "guard/entropy_drift",
        "entropy that fell: the policy repeats one answer; that rose: it learns from error tokens, or falls apart",
        "if it fell, raise algorithm.objective.entropy_coefficient or rollout.sampling.temperature; if it rose, lower "
        "learner.optimizer.lr and look at error_tokens/share and error_tokens/gradient",
    ),
    "error_share": Watch(
        "error_tokens/share",
        "the policy writes loops or garbage: responses far longer than it can hold together at this format, or an update that "
        "broke it",
        "lower rollout.sampling.max_tokens or learner.optimizer.lr, choose algorithm=tbpo, or a format of more bits "
        "(rollout.format)",
    ),
    "dropped": Watch(
        "mismatch/dropped_share",
        "the engine or the learner gives log-probs that are NaN or infinite: damaged weights or scales, or activations beyond the "
        "range of rollout.format",
        "look at the last sync (sync/canary, sync/tile_error), and at rollout.format=bf16 whether the same weights are sound",
    ),
    "timeouts": Watch(
        "reward/timeout_share",
        "the scorer is too slow for these responses, or the machine too busy for reward.workers",
        "raise reward.timeout_s, or lower reward.max_chars or reward.workers",
    ),
}
"""Name of a limit, in `guard.warn`, `guard.correct` and `guard.stop` -> what is watched."""

LEAST_ENTROPY = 1e-12
"""Nats a token: less counts as this much, so that the fall to none at all is a number."""


class Guard:
    """Owns what it remembers between steps: `state` goes into checkpoints, so that a resumed run is judged as a whole one."""

    def __init__(self, config: GuardConfig, say: Callable[[str], None]) -> None:
        self._config, self._say = config, say
        self.reads_back = False
        """The next sync is to compare every quantized tensor."""
        self._warned: dict[str, bool] = {}
        """Limits that the last step with their metric was beyond."""
        self._beyond: dict[str, list[float]] = {}
        """What was seen in a row beyond the limits that stop."""
        self._skipped = 0
        """Rollouts in a row that were not learnt from."""
        self._first_entropy: float | None = None
        self._corrected: set[str] = set()
        """In this step."""
        self._stop: str | None = None

    def leaves_out_timeouts(self, step: int, row: Mapping[str, float]) -> bool:
        """Whether responses that were not scored in time are left out of their groups."""
        return self._correct(step, "timeouts", row, "the responses that timed out are left out of their groups")

    def trusts(self, step: int, row: Mapping[str, float]) -> bool:
        """Whether the rollout is to be learnt from; not if every response of it is left out either."""
        done = "this rollout is not learnt from, and the next sync reads every quantized tensor back"
        self.reads_back = any([self._correct(step, name, row, done) for name in ("mismatch", "ess")])
        all_left_out = "timeouts" in self._corrected and row["reward/timeout_share"] == 1
        trusted = not self.reads_back and not all_left_out
        self._skipped = 0 if trusted else self._skipped + 1
        return trusted

    def goes_on(self, step: int, update: UpdateStats) -> bool:
        """Whether the mini-batches after this update are to be learnt from."""
        row = {"objective/kl_step": step_kl([update]), "grad_norm": update.grad_norm}
        done = "the mini-batches that are left of this rollout are skipped"
        return not any([self._correct(step, name, row, done) for name in ("kl", "grad_norm")])

    def look(self, step: int, row: Mapping[str, float]) -> dict[str, float]:
        """Judge a finished step; returns the metrics `guard/*`. A step without a metric (nothing to learn from) neither counts
        nor interrupts a row of steps."""
        left_out = row["reward/timeouts"] if "timeouts" in self._corrected else 0.0
        own = {"guard/corrections": float(len(self._corrected)), "guard/left_out": left_out}
        if "entropy" in row:
            self._first_entropy = self._first_entropy or row["entropy"]
        if "entropy" in row and self._first_entropy:
            entropy = largest((row["entropy"], LEAST_ENTROPY))
            own["guard/entropy_drift"] = max(entropy / self._first_entropy, self._first_entropy / entropy)
        seen = {**row, **own}
        measured = {name: seen[watch.metric] for name, watch in WATCHES.items() if watch.metric in seen}
        for name, value in measured.items():
            self._warn(step, name, value)
            self._count(step, name, value)
        self._count_skipped(step, row)
        self._corrected.clear()
        return {**own, "guard/warnings": float(sum(self._warned[name] for name in measured))}

    def enforce(self) -> None:
        """Raise `DivergenceError` where the step that was looked at is one too many."""
        if self._stop:
            raise DivergenceError(self._stop)

    def state(self) -> dict[str, Any]:
        """For `restore`, in JSON."""
        memory = (self.reads_back, self._warned, self._beyond, self._skipped, self._first_entropy)
        return dict(zip(("reads_back", "warned", "beyond", "skipped", "first_entropy"), memory, strict=True))

    def restore(self, state: Mapping[str, Any]) -> None:
        self.reads_back, self._first_entropy, self._skipped = (
            state[n] for n in ("reads_back", "first_entropy", "skipped")
        )
        self._warned, self._beyond = dict(state["warned"]), {name: list(seen) for name, seen in state["beyond"].items()}

    def _correct(self, step: int, name: str, row: Mapping[str, float], done: str) -> bool:
        value, limit = row[WATCHES[name].metric], getattr(self._config.correct, name)
        if not _exceeds(name, value, limit):
            return False
        self._corrected.add(name)
        self._say(_message(step, name, f"is {value:.4g}, guard.correct.{name}={limit:g}: {done}"))
        return True

    def _warn(self, step: int, name: str, value: float) -> None:
        limit = getattr(self._config.warn, name)
        before, self._warned[name] = self._warned.get(name, False), _exceeds(name, value, limit)
        if self._warned[name] and not before and name not in self._corrected:
            self._say(_message(step, name, f"is {value:.4g}, guard.warn.{name}={limit:g}"))

    def _count(self, step: int, name: str, value: float) -> None:
        limit = getattr(self._config.stop, name)
        if not math.isfinite(value):
            self._stop = self._stop or _message(step, name, f"is {value}")
        if not _exceeds(name, value, limit):
            self._beyond.pop(name, None)
            return
        seen = self._beyond.setdefault(name, [])
        seen.append(value)
        if len(seen) >= self._config.patience:
            values = ", ".join(f"{v:.4g}" for v in seen)
            saw = f"was {values} in {len(seen)} steps in a row, guard.stop.{name}={limit:g}"
            self._stop = self._stop or _message(step, name, saw)

    def _count_skipped(self, step: int, row: Mapping[str, float]) -> None:
        """A run whose every rollout is corrected away would reach its last step without having learnt."""
        if self._skipped < self._config.patience:
            return
        name = next(name for name in ("mismatch", "ess", "timeouts") if name in self._corrected)
        value, limit = row[WATCHES[name].metric], getattr(self._config.correct, name)
        saw = f"was {value:.4g}, guard.correct.{name}={limit:g}, and {self._skipped} rollouts in a row were not learnt from"
        self._stop = self._stop or _message(step, name, saw)


def _exceeds(name: str, value: float, limit: float | None) -> bool:
    """Not a number is beyond every limit there is."""
    return limit is not None and not (value >= limit if WATCHES[name].below else value <= limit)


def _message(step: int, name: str, saw: str) -> str:
    watch = WATCHES[name]
    return f"step {step}: {watch.metric} {saw}.\n  Usual cause: {watch.cause}.\n  What to change: {watch.change}."
