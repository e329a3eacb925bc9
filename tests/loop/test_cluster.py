"""Learner ranks and engines as Ray actors: what spreading, dying and starting again do to results. Random pocket weights."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch

from qarl import wire
from qarl.actors import EngineActors, spawn_learner
from qarl.batching import pack_to_score
from qarl.bridge import Bridge, OverLines, ThroughHost
from qarl.cluster import LearnerGroup, Sampler, ray_session
from qarl.errors import EngineError, LearnerError
from qarl.prepare import prepare
from qarl.records import Completion, Sample, Sampling, SyncRequest
from qarl.samples import deal, score
from qarl.seeds import completion_seeds

CHANGES = ("model.pocket.steps=0", "rollout.engine=torch", "rollout.format=bf16", "rollout.sampling.max_tokens=40")


@pytest.fixture(scope="module")
def config(small):
    return small(*CHANGES, "learner.optimizer.lr=1e-3", "learner.tokens=512", "rollout.restarts=1")


@pytest.fixture(scope="module")
def inputs(config):
    return prepare(config)


@pytest.fixture(scope="module")
def session(config) -> Iterator[None]:
    with ray_session(config):
        yield


def test_a_run_without_an_address_joins_no_ray_that_happens_to_run(config, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6399")
    asked: list[Any] = []

    def init(**arguments: Any) -> None:
        asked.append(arguments["address"])
        raise ConnectionError

    monkeypatch.setattr(ray, "init", init)
    for address in (None, "ray.example:6379"):
        placement = replace(config.placement, address=address)
        with pytest.raises(ConnectionError), ray_session(replace(config, placement=placement)):
            pass
    assert asked == ["local", "ray.example:6379"]


def actors(kind: str) -> list[psutil.Process]:
    """Processes of that actor class under this one, oldest first; a process's title says what it is doing."""
    running = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    found = [p for p in running if f"ray::{kind}" in "".join(p.cmdline())]
    return sorted(found, key=lambda p: p.create_time())


def kill_while_it_generates(nth: int) -> threading.Thread:
    """SIGKILL to the nth engine as soon as it is generating."""

    def work() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            engine = actors("_EngineActor")[nth]
            if "".join(engine.cmdline()).startswith("ray::_EngineActor.call"):
                time.sleep(0.05)  # in the middle of it
                return engine.kill()
            time.sleep(0.005)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def same(a: Completion, b: Completion) -> bool:
    return replace(a, tokens=b.tokens, logprobs=b.logprobs) == b and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "logprobs")
    )


def samples(config, inputs, learner: LearnerGroup) -> list[Sample]:
    """Twelve random responses of 1 to 12 tokens with random advantages, scored; their sampler was a little off."""
    rng = np.random.default_rng(0)
    made = []
    for prompt in inputs.heldout[:4]:
        for i in range(3):
            tokens = rng.integers(6, 100, rng.integers(1, 13)).astype(np.int32)
            completion = Completion(prompt.id, i, tokens, np.zeros(len(tokens), np.float32), "", "stop", 0)
            made.append(Sample(completion, prompt.tokens, 0.0, float(rng.standard_normal())))
    return [replace(s, completion=replace(s.completion, logprobs=_near(s.old_logprobs))) for s in score(learner, made)]


def _near(logprobs: np.ndarray | None) -> np.ndarray:
    assert logprobs is not None
    return logprobs + np.float32(1e-4)


def request(learner: LearnerGroup, version: int) -> SyncRequest:
    nobody, _ = pack_to_score([], learner.ranks, learner.tokens)
    return SyncRequest(version, 2, nobody, [])


def weights(learner: LearnerGroup, version: int) -> dict[str, torch.Tensor]:
    _, update = learner.publish(request(learner, version))
    return {name: wire.from_wire(parts["weight"]).clone() for name, parts in ray.get(update).tensors.items()}


def one_update(config, inputs, ranks: int, zero: int) -> tuple[LearnerGroup, dict[str, Any]]:
    learning = replace(config.learner, ranks=ranks, zero=zero, threads=1, tokens=128)
    config = replace(config, learner=learning, model=replace(config.model, max_tokens=128))
    learner = LearnerGroup(config, inputs.model)
    learner.wait()
    before, scored = weights(learner, 0), samples(config, inputs, learner)
    (batch,) = deal(scored, np.arange(len(scored)), 1, learner.ranks, learner.tokens)
    stats = learner.update(batch)
    return learner, {"before": before, "scored": scored, "stats": stats, "after": weights(learner, 1), "batch": batch}


@pytest.fixture(scope="module")
def single(session, config, inputs) -> tuple[LearnerGroup, dict[str, Any]]:
    return one_update(config, inputs, ranks=1, zero=1)


@pytest.fixture(scope="module")
def pair(session, config, inputs) -> tuple[LearnerGroup, dict[str, Any]]:
    return one_update(config, inputs, ranks=2, zero=2)


def check_same_update(one: dict[str, Any], two: dict[str, Any]) -> None:
    """Statistics to 1e-5, weights to 2 % of the step: summation order over ranks is all that differs in float32, and AdamW's
    first step divides by it where a gradient is near zero."""
    lr = one["stats"].lr
    assert all(torch.equal(one["before"][name], two["before"][name]) for name in one["before"])
    for a, b in zip(one["scored"], two["scored"], strict=True):
        assert np.abs(a.old_logprobs - b.old_logprobs).max() < 1e-5
    assert two["stats"].grad_norm == pytest.approx(one["stats"].grad_norm, rel=1e-5)
    assert dict(two["stats"].sums) == pytest.approx(dict(one["stats"].sums), rel=1e-4, abs=1e-5)
    for name, after in one["after"].items():
        assert (after - one["before"][name]).abs().max() > 0.5 * lr, f"{name} did not move"
        off = (two["after"][name] - after).abs()
        assert off.max() < 0.5 * lr and off.mean() < 1e-3 * lr, (name, off.max() / lr, off.mean() / lr)


def test_two_ranks_of_zero_2_learn_as_one(single, pair):
    assert len(pair[1]["batch"].ranks) == 2
    check_same_update(single[1], pair[1])


@pytest.mark.slow
def test_two_ranks_of_zero_3_learn_as_one(single, config, inputs):
    learner, found = one_update(config, inputs, ranks=2, zero=3)
    check_same_update(single[1], found)
    said = [served(config, inputs, bridge, request(learner, 2)) for bridge in both_bridges(learner)]
    learner.close()
    assert said[0] == said[1]


def test_engines_that_die_are_replaced_and_change_nothing(single, config, inputs):
    """Two engines answer as one does; one that is killed while it generates is started again, refilled, and asked again, and
    the answers are those of an undisturbed run; after `rollout.restarts` of that, the run ends."""
    learner = single[0]
    sampling, prompts = Sampling(temperature=1.0, max_tokens=100), inputs.heldout[:4]
    seeds = completion_seeds(0, "test", 0, len(prompts), 2)

    sampler = Sampler(
        replace(config, rollout=replace(config.rollout, replicas=2)), inputs.model, ThroughHost(learner.publish)
    )
    sampler.wait()
    checked: list[int] = []
    sampler.refill(request(learner, 5), lambda published, reports: checked.append(len(reports)))
    said = sampler.generate(prompts, sampling, seeds)
    assert [(c.prompt, c.sample) for c in said] == [(p.id, i) for p in prompts for i in range(2)]
    assert all(c.version == 5 for c in said) and sampler.restarted == 0
    assert len({c.tokens.tobytes() for c in said}) == len(said) and max(len(c.tokens) for c in said) == 100
    one = copy.copy(sampler)
    one._engines = sampler._engines[:1]
    assert [c.tokens.tolist() for c in one.generate(prompts, sampling, seeds)] == [c.tokens.tolist() for c in said]

    thread = kill_while_it_generates(-1)
    disturbed = sampler.generate(prompts, sampling, seeds)
    thread.join()
    assert sampler.restarted == 1 and checked == [2, 2], "canaries are compared again once an engine was started again"
    assert len(disturbed) == len(said) and all(same(a, b) for a, b in zip(disturbed, said, strict=True))

    thread = kill_while_it_generates(-1)
    with pytest.raises(
        EngineError, match=r"engine \d died: (.|\n)*started again 1 times already \(rollout\.restarts\)"
    ):
        sampler.generate(prompts, sampling, seeds)
    thread.join()


def both_bridges(learner: LearnerGroup) -> tuple[Bridge, Bridge]:
    return ThroughHost(learner.publish), OverLines("broadcast", learner)


def served(config, inputs, bridge: Bridge, *requests: SyncRequest, dies_at: int | None = None) -> list[list[int]]:
    """What two engines say after these syncs; one of them dies in the middle of the sync of that place."""
    sampler = Sampler(replace(config, rollout=replace(config.rollout, replicas=2)), inputs.model, bridge)
    sampler.wait()
    for i, asked in enumerate(requests):
        if i == dies_at:
            ray.get(sampler._engines[1].ranks[0].__ray_call__.remote(dies_while_it_loads))
        published, reports = sampler.refill(asked)
        assert published.version == asked.version and published.n_bytes > 0
        assert [report.version for report in reports] == [asked.version] * 2
    assert sampler.restarted == (dies_at is not None)
    prompts = inputs.heldout[:4]
    seeds = completion_seeds(0, "lines", 0, len(prompts), 2)
    said = sampler.generate(prompts, Sampling(temperature=1.0, max_tokens=20), seeds)
    for engine in sampler._engines:
        engine.kill()
    return [c.tokens.tolist() for c in said]


def test_versions_over_lines_are_those_through_the_host_also_where_an_engine_dies(single, config, inputs):
    """One that dies in the middle of a refill is started again, given a line, and refilled to the version that was asked for."""
    learner = single[0]
    versions = [request(learner, 7), request(learner, 8)]
    host, lines = both_bridges(learner)
    assert served(config, inputs, host, *versions) == served(config, inputs, lines, *versions, dies_at=1)


def test_a_learner_that_cannot_hold_a_line_is_named_and_not_the_line_that_broke_for_want_of_it(single, config, inputs):
    learner = single[0]
    (rank,) = learner._ranks
    ray.get(rank.__ray_call__.remote(cannot_answer))
    try:
        sampler = Sampler(config, inputs.model, OverLines("broadcast", learner))
        with pytest.raises(ZeroDivisionError):
            sampler.wait()
    finally:
        ray.get(rank.__ray_call__.remote(can_answer))
    for engine in sampler._engines:
        engine.kill()


# Of no module, so that Ray sends it by value.
carriers = "__import__('qarl.carriers', fromlist=['answer'])"
cannot_answer = eval(f"lambda actor: vars({carriers}).update(kept={carriers}.answer, answer=lambda *_: 1 / 0)")
can_answer = eval(f"lambda actor: vars({carriers}).update(answer={carriers}.kept)")
dies_while_it_loads = eval("lambda actor: setattr(actor._engine, '_load', lambda tensors: __import__('os')._exit(1))")
own_pid = eval("lambda actor: __import__('os').getpid()")  # of no module, so that Ray sends it by value


def test_a_rank_that_dies_is_named_and_resume_advised(single, pair):
    """Rank 0 fails too, for want of its fellow: rank 1 is the one to name."""
    learner, found = pair
    killed = ray.get(learner._ranks[1].__ray_call__.remote(own_pid))
    os.kill(killed, signal.SIGKILL)
    with pytest.raises(LearnerError, match=r"learner rank 1 died(.|\n)*resume=auto continues"):
        learner.update(found["batch"])


@pytest.mark.parametrize(
    ("shell", "setting", "engine", "learner"), [(None, None, "8", "4"), ("3", None, "3", "3"), ("3", 1, "3", "1")]
)
def test_actors_take_the_threads_that_the_shell_says_or_else_share_the_cores(
    config, monkeypatch, shell, setting, engine, learner
):
    asked = []

    class Remote:
        def __init__(self, kind: Any) -> None:
            self.kind = kind

        def options(self, **how: Any) -> Any:
            asked.append(how["runtime_env"]["env_vars"]["OMP_NUM_THREADS"])
            return self

        def remote(self) -> None: ...

    monkeypatch.setattr(ray, "remote", Remote)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if shell:
        monkeypatch.setenv("OMP_NUM_THREADS", shell)
    EngineActors(config, 0)
    spawn_learner(replace(config, learner=replace(config.learner, ranks=2, threads=setting)), 0)
    assert asked == [engine, learner]
