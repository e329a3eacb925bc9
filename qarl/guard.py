"""Stops a run whose numbers no longer mean anything."""

import math
from collections.abc import Mapping

from qarl.config import GuardConfig
from qarl.errors import DivergenceError

CAUSES = {
    "mismatch/mean_abs": (
        "the learner does not compute what the engine serves (learner.backend=none, or a learner that has moved "
        "far from the published weights), or the policy writes tokens that neither side can score well",
        "use learner.backend=auto, lower learner.optimizer.lr, or allow more with guard.max_mismatch",
    ),
    "grad_norm": (
        "the learning rate is too high, or a few responses with huge ratios dominate the update",
        "lower learner.optimizer.lr or add learner.optimizer.warmup, choose an objective that bounds negative "
        "responses (algorithm=tbpo), or allow more with guard.max_grad_norm",
    ),
}
"""What is watched -> what usually makes it large, what to change."""


class Guard:
    """Holds nothing but how long each limit has been exceeded; a resumed run starts counting at zero."""

    def __init__(self, config: GuardConfig) -> None:
        self._limits = {
            "mismatch/mean_abs": ("guard.max_mismatch", config.max_mismatch),
            "grad_norm": ("guard.max_grad_norm", config.max_grad_norm),
        }
        self._patience = config.patience
        self._exceeded: dict[str, list[float]] = {name: [] for name in self._limits}

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises DivergenceError: at once for NaN or infinity, after `patience` steps in a row for a limit.

        A step without a metric (nothing to learn from) neither counts nor interrupts the row.
        """
        for name, (key, limit) in self._limits.items():
            if name not in metrics:
                continue
            value, seen = metrics[name], self._exceeded[name]
            if not math.isfinite(value):
                raise DivergenceError(_message(step, name, f"is {value}"))
            if value <= limit:
                seen.clear()
                continue
            seen.append(value)
            if len(seen) >= self._patience:
                values = ", ".join(f"{v:.4g}" for v in seen)
                raise DivergenceError(
                    _message(step, name, f"was {values} in {len(seen)} steps in a row, {key}={limit:g}")
                )


def _message(step: int, name: str, saw: str) -> str:
    cause, change = CAUSES[name]
    return f"step {step}: {name} {saw}.\n  Usual cause: {cause}.\n  What to change: {change}."
