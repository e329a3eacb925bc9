"""`python poisoned_run.py recipe=quickstart …`: a run in which the gradient of the fifth update is NaN."""

from typing import Any

from qarl import actors
from qarl.cli import launch
from qarl.records import Standing
from qarl.train import train


class PoisonedLearner(actors._LearnerActor):
    def start(self, arguments: dict[str, Any]) -> Standing:
        standing = super().start(arguments)
        learner = self._learner
        some = next(learner.model.parameters())
        some.register_hook(lambda gradient: gradient * float("nan") if learner.updates == 4 else gradient)
        return standing


if __name__ == "__main__":
    actors._LearnerActor = PoisonedLearner  # type: ignore[misc]
    launch(train, "train")
