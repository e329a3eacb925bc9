"""A learner whose engine is gone when it wants to publish."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qarl.trainer.learner import Learner
from qarl.transfer import PeerLost


@pytest.mark.parametrize("zero", [2, 3])
def test_an_engine_that_is_gone_before_a_version_begins_leaves_the_learner_without_a_line(zero: int):
    """The driver starts it again and asks once more: the learner answers as ever, with canaries."""

    def gone(*_: Any) -> None:
        raise PeerLost("an engine is gone")

    learner: Any = object.__new__(Learner)
    learner.config, learner.format = SimpleNamespace(zero=zero), SimpleNamespace(name="bf16")
    closed: list[bool] = []
    learner._outlet = SimpleNamespace(begin=gone, close=lambda: closed.append(True), plan=SimpleNamespace(n_bytes=7))
    learner._gathered, learner.contract_hash = lambda: iter(()), lambda: "aaaa"
    learner.score = lambda canaries, temperature: [np.full(len(canaries), temperature)]
    n_bytes, seconds, scored = learner.publish_to_line(3, 0, ["canary"])
    assert (n_bytes, seconds) == (7, {}) and scored[0].tolist() == [1.0]
    assert closed == [True] and learner._outlet is None
