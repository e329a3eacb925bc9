"""Versions over lines: everything arrives where it belongs, buffers are not overwritten early, and a side that dies is noticed."""

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from multiprocessing import AuthenticationError, Pipe
from typing import Any

import pytest
import torch

from qarl import carriers
from qarl.errors import SyncError
from qarl.formats import Shape, get
from qarl.fusion import module_of
from qarl.transfer import SLOTS, Address, Door, Inlet, Manifest, Outlet, PeerLost, Plan, dial
from qarl.wire import Spec, published_specs

SHAPES: dict[str, Shape] = {"model.embed_tokens.weight": (50, 64)}
for layer in range(5):
    block = f"model.layers.{layer}"
    SHAPES |= {
        f"{block}.self_attn.q_proj.weight": (32, 64),
        f"{block}.self_attn.q_proj.bias": (32,),
        f"{block}.self_attn.k_proj.weight": (16, 64),
        f"{block}.self_attn.k_proj.bias": (16,),
        f"{block}.self_attn.v_proj.weight": (16, 64),
        f"{block}.self_attn.v_proj.bias": (16,),
        f"{block}.mlp.experts.gate_up_proj": (4, 48, 64),
        f"{block}.mlp.experts.down_proj": (4, 64, 32),
        f"{block}.input_layernorm.weight": (64,),
    }
CPU = torch.device("cpu")


@pytest.fixture
def plan() -> Plan:
    return Plan.of(published_specs(SHAPES, get("w4a16_g32"), torch.bfloat16))


@pytest.fixture
def line() -> Iterator[Callable[..., tuple[Outlet, list[Inlet]]]]:
    """`line(plan, 2)`: the learner's end, and those of two engines."""
    opened: list[Outlet | Inlet] = []

    def hold(plan: Plan, n: int = 1) -> tuple[Outlet, list[Inlet]]:
        door = Door("127.0.0.1")
        with ThreadPoolExecutor(n) as pool:
            calling = [pool.submit(carriers.call, door.address, CPU) for _ in range(n)]
            outlet = carriers.answer(door, "broadcast", n, plan, carriers.staging(plan.capacity, CPU))
            inlets = [one.result() for one in calling]
        door.close()
        opened.extend([outlet, *inlets])
        return outlet, inlets

    yield hold
    for end in opened:
        end.close()


def fill(outlet: Outlet, version: int, upto: int | None = None) -> None:
    """Each part full of a number of its own."""
    outlet.begin(version, "w4a16_g32", "abc")
    for i, (name, parts) in enumerate(list(outlet.plan.specs.items())[:upto]):
        room = outlet.room(name)
        assert {part: Spec.of(values) for part, values in room.items()} == parts
        for values in room.values():
            values.view(torch.uint8).fill_((version + i) % 251)
        outlet.done(name)
    if upto is None:
        outlet.announce(Manifest({}, ()))
        outlet.finish()


def read(inlet: Inlet, version: int, pause: float = 0.0) -> int:
    """How many tensors came; every byte of each is as `fill` wrote it, also after a pause."""
    delivery = inlet.begin()
    assert (delivery.version, delivery.format, delivery.contract_hash) == (version, "w4a16_g32", "abc")
    names = list(inlet.plan.specs)
    n = 0
    for tensors in delivery.buckets():
        time.sleep(pause)
        for name, parts in tensors.items():
            expected = (version + names.index(name)) % 251
            assert all((values.view(torch.uint8) == expected).all() for values in parts.values()), name
            n += 1
    assert delivery.manifest() == Manifest({}, ())
    return n


def in_thread(work: Callable[[], object]) -> "Future[object]":
    return ThreadPoolExecutor(1).submit(work)


def test_a_plan_holds_every_part_once_in_order_and_modules_whole(plan):
    specs = published_specs(SHAPES, get("w4a16_g32"), torch.bfloat16)
    assert plan.specs == specs and list(plan.specs) == list(specs)
    assert plan.n_bytes == sum(spec.n_bytes for parts in specs.values() for spec in parts.values())
    homes: dict[str, set[int]] = {}
    for i, bucket in enumerate(plan.buckets):
        buffer = torch.zeros(plan.size(i), dtype=torch.uint8)
        for place in bucket:
            view = place.view(buffer).view(torch.uint8)
            assert not view.any(), "parts overlap"
            view.fill_(1)
            homes.setdefault(module_of(place.name), set()).add(i)
    assert all(len(buckets) == 1 for buckets in homes.values())
    experts = "model.layers.0.mlp.experts"
    assert module_of(f"{experts}.w13") == module_of(f"{experts}.w2") == experts
    assert module_of("model.layers.0.self_attn.qkv_proj.bias") == "model.layers.0.self_attn.qkv_proj"


def test_staging_memory_is_bounded_by_the_largest_module(plan):
    sizes: dict[str, int] = {}
    for name, parts in plan.specs.items():
        sizes[module_of(name)] = sizes.get(module_of(name), 0) + sum(-(-s.n_bytes // 256) * 256 for s in parts.values())
    assert plan.capacity == max(sizes.values())
    assert len(plan.buckets) > SLOTS


def test_versions_arrive_whole_at_every_engine_however_slow_it_reads(plan, line):
    outlet, inlets = line(plan, 2)
    assert all(inlet.plan == plan for inlet in inlets)
    for version in range(3):
        reading = [in_thread(partial(read, inlet, version, pause=0.01 * i)) for i, inlet in enumerate(inlets)]
        fill(outlet, version)
        assert [one.result(20) for one in reading] == [len(plan.specs)] * 2


class Shared:
    """A carrier of buffers that both sides have, as CUDA IPC is: nothing but the order of reads and writes protects them."""

    def __init__(self, buffers: Sequence[torch.Tensor]) -> None:
        self.buffers = buffers

    def claim(self, slot: int) -> None: ...

    def push(self, slot: int, n_bytes: int) -> None: ...

    def pull(self, slot: int, n_bytes: int) -> None: ...

    def release(self, slot: int) -> None: ...

    def close(self) -> None: ...


def test_a_buffer_that_both_sides_have_is_not_written_before_it_was_read(plan):
    mine, theirs = Pipe()
    buffers = carriers.staging(plan.capacity, CPU)
    outlet, inlet = Outlet(plan, Shared(buffers), [mine]), Inlet(theirs, Shared(buffers))
    for version in range(3):
        reading = in_thread(partial(read, inlet, version, pause=0.01))
        fill(outlet, version)
        assert reading.result(20) == len(plan.specs)


def test_an_engine_that_dies_before_its_line_stands_is_not_waited_for(plan):
    door = Door("127.0.0.1")
    buffers = carriers.staging(plan.capacity, CPU)
    for heard in (0, 1, 2):  # nothing; what kind of line it will be; where to meet
        answering = in_thread(lambda: carriers.answer(door, "broadcast", 1, plan, buffers))
        peer = dial(door.address)
        for _ in range(heard):
            peer.recv()
        peer.close()
        with pytest.raises(PeerLost, match="gone before its line stood"):
            answering.result(20)
    door.close()


def test_a_line_asks_a_silent_host_whether_it_is_there():
    door = Door("127.0.0.1")
    with ThreadPoolExecutor(1) as pool:
        accepting = pool.submit(door.accept, 1)
        ends = [dial(door.address), *accepting.result(20)]
    for end in ends:
        with socket.socket(fileno=os.dup(end.fileno())) as line:
            assert line.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert line.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30
        end.close()
    door.close()


def test_a_learner_that_dies_half_way_is_noticed(plan, line):
    outlet, (inlet,) = line(plan)
    reading = in_thread(lambda: read(inlet, 4))
    fill(outlet, 4, upto=6)
    outlet.close()
    with pytest.raises(SyncError, match="gone before it sent bucket . of version 4"):
        reading.result(20)


def test_an_engine_that_dies_half_way_is_noticed(plan, line):
    outlet, (inlet,) = line(plan)
    delivery = inlet.begin

    def one_bucket() -> None:
        next(iter(delivery().buckets()))
        inlet.close()

    reading = in_thread(one_bucket)
    with pytest.raises(PeerLost, match="an engine is gone"):
        fill(outlet, 1)
    reading.result(20)


def test_a_bucket_left_out_is_noticed(plan, line):
    outlet, (inlet,) = line(plan)
    reading = in_thread(lambda: read(inlet, 0))
    told, outlet._tell = outlet._tell, lambda message: None if message == 1 else told(message)
    outlet._await_release = lambda: None
    in_thread(lambda: fill(outlet, 0))  # ends as it may, once the line is cut
    with pytest.raises(SyncError, match="bucket 2 came in place of bucket 1"):
        reading.result(20)


def test_a_caller_without_the_secret_is_turned_away_and_one_with_it_is_let_in():
    door = Door("127.0.0.1")
    waiting = in_thread(lambda: door.accept(1))
    stranger = Address(door.address.host, door.address.port, b"guess")
    with pytest.raises((AuthenticationError, EOFError, OSError)):
        dial(stranger)
    dial(door.address).send("hello")
    peers: Any = waiting.result(20)
    assert [peer.recv() for peer in peers] == ["hello"]
    assert b"guess" not in repr(stranger).encode()
    door.close()


def test_tensors_out_of_the_order_of_the_plan_are_refused(plan, line):
    outlet, (inlet,) = line(plan)
    outlet.begin(0, "w4a16_g32", "abc")
    last = plan.buckets[-1][0].name
    with pytest.raises(ValueError, match=f"{last} is of bucket .* which does not follow bucket -1"):
        outlet.room(last)


def test_an_engine_that_refuses_the_version_leaves_no_learner_waiting(plan, line):
    outlet, (inlet,) = line(plan)

    def refuse() -> None:
        inlet.begin().abandon()

    reading = in_thread(refuse)
    with pytest.raises(PeerLost, match="an engine is gone"):
        fill(outlet, 1)
    reading.result(20)
