"""`python poisoned_run.py recipe=quickstart …`: a run in which the gradient of the fifth update is NaN."""

from typing import Any

from qarl import cluster
from qarl.cli import launch
from qarl.train import train


class PoisonedLearner(cluster._LearnerActor):
    def start(self, arguments: dict[str, Any]) -> cluster.Standing:
        standing = super().start(arguments)
        learner = self._learner
        some = next(learner.model.parameters())
        some.register_hook(lambda gradient: gradient * float("nan") if learner.updates == 4 else gradient)
        return standing


if __name__ == "__main__":
    cluster._LearnerActor = PoisonedLearner  # type: ignore[misc]
    launch(train, "train")
