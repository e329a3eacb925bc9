"""An engine that is refilled over a line, bucket by bucket, from another thread; and what is left of it when the line breaks."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from qarl import carriers
from qarl.errors import EngineError, SyncError
from qarl.formats import get
from qarl.fusion import covered_shapes
from qarl.records import Prompt, Sampling
from qarl.trainer.publish import publish
from qarl.transfer import Door, Outlet, PeerLost, Plan
from qarl.wire import published_specs

CASES = [
    ("torch", "w4a16_g32", "qwen3_moe"),
    ("torch", "w8a8_int8", "qwen3"),
    ("vllm", "w8a8_int8", "qwen3"),
    ("vllm", "bf16", "llama"),
]
PROMPTS = [
    Prompt(i, "", np.array([ord(c) - 25 for c in t], np.int32), "") for i, t in enumerate(("2 + 2 =", "what?", "x"))
]
GREEDY = Sampling(temperature=0, max_tokens=12)


class Line:
    """A model, an engine, and what joins them."""

    def __init__(self, engine: Any, model: Any, format: str) -> None:
        self.engine, self.model, self.format = engine, model, get(format)
        self.shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        self.plan = Plan.of(published_specs(self.shapes, self.format, torch.float32))
        self.contract = self.format.contract_hash(covered_shapes(self.shapes, self.format))
        self.pool = ThreadPoolExecutor(1)
        self.outlet: Any = None
        self.connect()

    def connect(self) -> None:
        if self.outlet:
            self.outlet.close()
        door = Door("127.0.0.1")
        answering = self.pool.submit(
            carriers.answer, door, "broadcast", 1, self.plan, carriers.staging(self.plan.capacity, torch.device("cpu"))
        )
        self.engine.connect(door.address)
        self.outlet = answering.result()
        door.close()

    def sync(self, version: int, canaries: Any = (), upto: int | None = None) -> Any:
        sending = self.pool.submit(self._send, version, upto)
        try:
            return self.engine.refill_from_line(canaries)
        finally:
            sending.result()

    def _send(self, version: int, upto: int | None) -> None:
        outlet: Outlet = self.outlet
        weights = list(self.model.named_parameters())
        try:
            outlet.begin(version, self.format.name, self.contract)
            if upto is not None:
                publish(weights[:upto], self.shapes, self.format, version, 0, outlet)
            manifest, _ = publish(weights, self.shapes, self.format, version, 64, outlet)
            outlet.announce(manifest)
            outlet.finish()
        except (PeerLost, ValueError):  # of a publisher that stops half way
            outlet.close()

    def greedy(self) -> list[list[int]]:
        return [c.tokens.tolist() for c in self.engine.generate(PROMPTS, GREEDY, np.zeros((len(PROMPTS), 1), np.int64))]


@pytest.fixture(params=CASES, ids="-".join)
def line(request, start, weights) -> Iterator[Line]:
    engine, format, kind = request.param
    made = Line(start(engine, format, kind), weights(kind, 1), format)
    yield made
    made.outlet.close()


def test_it_serves_what_one_serves_that_was_refilled_through_the_host(line: Line, published):
    report = line.sync(0, [PROMPTS[0].tokens])
    assert report.version == line.engine.version == 0 and report.contract_hash == line.engine.contract_hash()
    assert report.max_tile_error < 1e-6
    over_the_line = line.greedy()
    (scored,) = line.engine.score([PROMPTS[0].tokens], [1])
    np.testing.assert_array_equal(report.canaries[0], scored)
    line.engine.refill(published(line.model, line.format.name, 1))
    assert line.greedy() == over_the_line


def test_versions_follow_each_other_over_one_line(line: Line, weights):
    said = []
    for version in range(3):
        with torch.no_grad():
            for parameter in line.model.parameters():
                parameter.mul_(-1)
        line.sync(version)
        said.append(line.greedy())
    assert said[0] == said[2] != said[1]


def test_a_learner_that_dies_half_way_leaves_an_engine_that_refuses_until_it_is_refilled(line: Line):
    line.sync(0)
    before = line.greedy()
    with pytest.raises(SyncError, match="the learner (was gone before it sent bucket|is gone in the middle)"):
        line.sync(1, upto=len(line.shapes) // 2)
    with pytest.raises(EngineError, match="its last refill failed"):
        line.greedy()
    line.connect()
    line.sync(1)
    assert line.greedy() == before


def test_a_stale_version_and_another_contract_cut_the_line_before_anything_is_loaded(line: Line):
    line.sync(5)
    with pytest.raises(SyncError, match="weights of version 4 are stale"):
        line.sync(4)
    line.connect()
    line.contract = "deadbeef"
    with pytest.raises(SyncError, match="contract mismatch.* deadbeef"):
        line.sync(6)


def test_an_engine_that_fails_before_it_has_heard_all_cuts_the_line(line: Line, monkeypatch):
    """Else the rest of this version would be taken for the next one, and the learner wait for ever."""
    line.sync(0)
    with monkeypatch.context() as broken:
        broken.setattr(line.engine, "_wake_caches", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            line.sync(1)
    with pytest.raises(SyncError, match="the learner was gone"):
        line.engine.refill_from_line()
    line.connect()
    assert line.sync(2).version == 2
