"""One weight sync against a real engine in this process, and every way in which its proof can fail."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qarl import formats
from qarl.batching import pack_to_score
from qarl.cluster import engine_arguments
from qarl.errors import EngineError, SyncError
from qarl.prepare import prepare
from qarl.records import Published, Sampling
from qarl.rollout.engine import open_engine
from qarl.sync import canary_gap, sync
from qarl.trainer.model import load_model
from qarl.trainer.publish import model_update


class Learner:
    """Publishes a fixed model, perhaps changed by `tamper`; computes what the engine computes, plus `error` nats."""

    ranks, tokens = 1, 512

    def __init__(self, model, engine, tamper=lambda update: update, error=0.0, header=None) -> None:
        self.model, self.engine, self.tamper, self.error, self.header = model, engine, tamper, error, header or {}


class Sampler:
    """All engines are the one in this process, which is refilled before the learner scores with it."""

    def __init__(self, learner: Learner) -> None:
        self.learner, self.engine = learner, learner.engine

    def refill(self, request, check):
        learner = self.learner
        update = learner.tamper(model_update(learner.model, formats.get("w8a8_int8"), request.version, request.n_tiles))
        reports = [self.engine.refill(update, request.sequences)]
        header = {"contract_hash": update.contract_hash, "n_bytes": update.n_bytes, "seconds": update.seconds}
        (rank,) = request.canaries.ranks
        canaries = [[np.concatenate(self._scores(m)) + np.float32(learner.error) for m in rank]]
        published = Published(**{"version": request.version, **header, **learner.header}, canaries=canaries)
        check(published, reports)
        return published, reports

    def _scores(self, micro):
        return self.engine.score(np.split(micro.tokens, np.cumsum(micro.lengths)[:-1]), micro.prompt_lengths.tolist())


@pytest.fixture(scope="module")
def parts(small) -> Any:
    config = small("model.pocket.steps=0", "rollout.engine=torch", "sync.canary_tolerance=0.1")
    inputs = prepare(config)
    engine = open_engine(**engine_arguments(config, inputs.model))
    return config, inputs, load_model(inputs.model, torch.float32), engine


def attempt(parts, version=0, backend="auto", **learner) -> dict[str, float]:
    config, inputs, model, engine = parts
    engine.version = None  # each attempt is a first one
    config = replace(config, learner=replace(config.learner, backend=backend))
    publisher = Learner(model, engine, **learner)
    return sync(config, publisher, Sampler(publisher), version, inputs.canaries)  # type: ignore[arg-type]


def test_a_good_sync_reports_its_proof_and_its_stages(parts):
    row = attempt(parts, version=3)
    assert row["sync/canary"] == 0.0 and row["sync/tile_error"] < 1e-6
    assert row["sync/gb"] == pytest.approx(0.45e-3, rel=0.3)
    assert {"sync/quantize_s", "sync/pack_s", "sync/transfer_s", "sync/load_s", "sync/verify_s"} <= row.keys()
    assert all(value >= 0 for value in row.values())


def test_a_learner_of_another_contract_is_refused_by_the_engine(parts):
    with pytest.raises(SyncError, match="contract mismatch: .*deadbeef"):
        attempt(parts, tamper=lambda update: replace(update, contract_hash="deadbeef"))


def test_an_engine_that_proved_another_contract_than_was_published_is_refused(parts):
    with pytest.raises(SyncError, match="version 7: the engine's contract .* is not the learner's deadbeef"):
        attempt(parts, version=7, header={"contract_hash": "deadbeef"})


def test_a_canary_beyond_tolerance_is_refused(parts):
    with pytest.raises(
        SyncError, match=r"version 0: on 4 canaries .* differ by 0\.2 nats .* sync\.canary_tolerance = 0\.1"
    ):
        attempt(parts, error=0.2)


def test_a_canary_that_is_not_a_number_is_refused(parts):
    with pytest.raises(SyncError, match="differ by nan nats"):
        attempt(parts, error=float("nan"))


def test_the_worst_engines_canaries_count_and_not_a_number_is_the_worst():
    sequences = [np.arange(5, dtype=np.int32)]
    _, order = pack_to_score(sequences, 1, 8)
    published: Any = SimpleNamespace(canaries=[[np.zeros(4, np.float32)]])
    scores = {
        "good": np.full(4, 0.1, np.float32),
        "worse": np.full(4, 0.2, np.float32),
        "nan": np.full(4, np.nan, np.float32),
    }

    def gap(*names: str) -> float:
        reports: Any = [SimpleNamespace(canaries=[scores[name]]) for name in names]
        return canary_gap(order, published, reports)

    assert gap("good", "worse") == gap("worse", "good") == pytest.approx(0.2)
    assert np.isnan(gap("good", "nan")) and np.isnan(gap("nan", "good"))


def test_an_unaligned_learner_is_measured_but_not_refused(parts):
    assert attempt(parts, error=0.2, backend="none")["sync/canary"] == pytest.approx(0.2, abs=1e-5)


def test_weights_other_than_published_are_refused_and_nothing_is_generated_with_them(parts):
    def move_a_tile(update):
        first, *others = update.tiles
        return replace(update, tiles=(replace(first, values=first.values + np.abs(first.values).max()), *others))

    with pytest.raises(SyncError, match="serves other weights than were published"):
        attempt(parts, tamper=move_a_tile)
    _, inputs, _, engine = parts
    with pytest.raises(EngineError, match="its last refill failed"):
        engine.generate(inputs.heldout[:1], Sampling(max_tokens=4), np.zeros((1, 1), np.int64))
    attempt(parts)
    assert len(engine.generate(inputs.heldout[:1], Sampling(max_tokens=4), np.zeros((1, 1), np.int64))) == 1


def test_bytes_that_changed_on_the_way_are_refused(parts):
    def flip(update):
        name = next(iter(update.tensors))
        part, wire = next(iter(update.tensors[name].items()))
        data = wire.data.copy()
        data[5] ^= 1
        changed = {**update.tensors[name], part: replace(wire, data=data)}
        return replace(update, tensors={**update.tensors, name: changed})

    with pytest.raises(SyncError, match="was changed on the way"):
        attempt(parts, tamper=flip)
