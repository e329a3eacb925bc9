"""Engines of two ranks (tensor parallelism) as Ray actors, filled by a learner: over lines, through the host, and as one dies."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import ray

from qarl.batching import pack_to_score
from qarl.bridge import Bridge, OverLines, ThroughHost
from qarl.cluster import LearnerGroup, Sampler, ray_session
from qarl.prepare import prepare
from qarl.records import Sampling, SyncRequest
from qarl.seeds import completion_seeds
from qarl.sync import sync

pytestmark = pytest.mark.slow  # every rank imports vLLM


@pytest.fixture(scope="module")
def config(small):
    return small(
        "model.pocket.steps=0",
        "rollout.engine=vllm",
        "rollout.format=bf16",
        "rollout.kv_cache_gb=0.05",
        "rollout.tensor_parallel=2",
        "rollout.restarts=1",
    )


@pytest.fixture(scope="module")
def inputs(config):
    return prepare(config)


@pytest.fixture(scope="module")
def learner(config, inputs) -> Iterator[LearnerGroup]:
    with ray_session(config):
        made = LearnerGroup(config, inputs.model)
        made.wait()
        yield made


def request(learner: LearnerGroup, version: int) -> SyncRequest:
    nobody, _ = pack_to_score([], learner.ranks, learner.tokens)
    return SyncRequest(version, 2, nobody, [])


# Of no module, so that Ray sends it by value.
dies = {
    "_load": eval("lambda actor: setattr(actor._engine, '_load', lambda tensors: __import__('os')._exit(1))"),
    "_run": eval("lambda actor: setattr(actor._engine, '_run', lambda *unused: __import__('os')._exit(1))"),
}


def said(sampler: Sampler, inputs) -> list[list[int]]:
    prompts = inputs.heldout[:3]
    seeds = completion_seeds(0, "ranks", 0, len(prompts), 2)
    found = sampler.generate(prompts, Sampling(temperature=1.0, max_tokens=16), seeds)
    assert [(c.prompt, c.sample) for c in found] == [(p.id, i) for p in prompts for i in range(2)]
    return [c.tokens.tolist() for c in found]


def test_a_rank_that_dies_takes_its_engine_with_it_and_another_is_refilled_and_answers_alike(config, inputs, learner):
    host: Bridge = ThroughHost(learner.publish)
    lines: Bridge = OverLines("broadcast", learner)
    found = []
    for bridge, rank, where in ((host, None, ""), (lines, 1, "_load"), (host, 1, "_run"), (host, 0, "_run")):
        sampler = Sampler(config, inputs.model, bridge)
        sampler.wait()
        row = sync(config, learner, sampler, 3, inputs.canaries)
        assert row["sync/canary"] < 1e-4
        if rank is not None:
            ray.get(sampler._engines[0].ranks[rank].__ray_call__.remote(dies[where]))
        if where == "_load":
            published, (report,) = sampler.refill(request(learner, 4))
            assert published.version == report.version == 4
        found.append(said(sampler, inputs))
        assert sampler.restarted == (rank is not None)
        for engine in sampler._engines:
            engine.kill()
    assert found[0] == found[1] == found[2] == found[3]
    assert len({tuple(tokens) for tokens in found[0]}) > 1
    assert np.isfinite(row["sync/total_s"])
