"""`python broken_run.py FAULT recipe=quickstart …`: a run that is broken in this way.

stale    the engine says it took every version, and serves the first
scale    the engine's scales of one tensor are half as large again as was published
router   the engine rounds its routers to four bits
numbers  the engine's log-probs are not numbers
timeout  the scorer hangs on responses with an odd number of digits
none     nothing
"""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

Tensors = Mapping[str, Mapping[str, Any]]
TENSOR = "model.layers.1.mlp.down_proj"


def stale(tensors: Tensors, version: int | None) -> Tensors:
    return tensors if version is None else {}


def scale(tensors: Tensors, version: int | None) -> Tensors:
    parts = tensors[TENSOR]
    return {**tensors, TENSOR: {**parts, "weight_scale": parts["weight_scale"] * 1.5}}


def router(tensors: Tensors, version: int | None) -> Tensors:
    def rounded(values: Any) -> Any:
        step = values.abs().max() / 7
        return (values / step).round() * step

    routers = [name for name in tensors if name.endswith("mlp.gate")]
    assert routers
    return {**tensors, **{name: {"weight": rounded(tensors[name]["weight"])} for name in routers}}


def hangs(response: str, answer: str, extras: Mapping[str, object]) -> float:
    if extras and sum(character.isdigit() for character in response) % 2:
        time.sleep(60)
    from qarl.scoring import SCORES

    return SCORES["reasoning_gym"](response, answer, extras)


WEIGHTS: dict[str, Callable[[Tensors, int | None], Tensors]] = {"stale": stale, "scale": scale, "router": router}


def break_engines(fault: Callable[[Tensors, int | None], Tensors]) -> None:
    """From now on they load what `fault` makes of what arrived."""
    from qarl import actors

    class BrokenEngine(actors._EngineActor):
        def start(self, arguments: dict[str, Any], rank: int, meeting: str) -> str:
            contract = super().start(arguments, rank, meeting)
            engine: Any = self._engine
            load = engine._load
            engine._load = lambda tensors: load(fault(tensors, engine.version))
            return contract

    actors._EngineActor = BrokenEngine  # type: ignore[misc]


def break_logprobs() -> None:
    """From now on engines say NaN of every token they write."""
    from dataclasses import replace

    from qarl import actors

    class BrokenEngine(actors._EngineActor):
        def start(self, arguments: dict[str, Any], rank: int, meeting: str) -> str:
            contract = super().start(arguments, rank, meeting)
            engine: Any = self._engine
            generate = engine._generate
            engine._generate = lambda *asked: [replace(c, logprobs=c.logprobs * float("nan")) for c in generate(*asked)]
            return contract

    actors._EngineActor = BrokenEngine  # type: ignore[misc]


def break_rewards() -> None:
    from functools import partial

    from qarl import loop

    loop.Rewarder = partial(loop.Rewarder, score=hangs)  # type: ignore[misc,assignment]


def main() -> None:
    from qarl.cli import launch
    from qarl.train import train

    fault = sys.argv.pop(1)
    if fault in WEIGHTS:
        break_engines(WEIGHTS[fault])
    elif fault == "numbers":
        break_logprobs()
    elif fault == "timeout":
        break_rewards()
    launch(train, "train")


if __name__ == "__main__":  # workers of rewards import this file too: what it needs is imported late
    main()
