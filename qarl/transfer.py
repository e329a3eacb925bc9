"""The way of a policy from the learner's memory to engines', in low bits: a few buffers, filled and read in turn.

    learner                                            engine
    Outlet.begin(version, …)        ── control ──►     Inlet: version, format, contract
    Outlet.room(name) … done(name)  ══ buffer ═══►     Inlet.buckets(): views of the buffer, loaded where they are needed
    Outlet.announce(manifest)       ── control ──►     Inlet.manifest(): checksums and tiles

The plan of what lies where in which bucket is the same for every version and travels once. Control messages are a few bytes over
a socket; how a bucket's bytes cross is a `Carrier`'s business (`qarl.carriers`). Staging memory on each side is two buffers of the
largest bucket. A side that dies closes its socket, which the other one notices wherever it waits; where its host dies, within a
minute.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any, Protocol

import torch
from torch import Tensor

from qarl.errors import LineLost, SyncError
from qarl.fusion import module_of
from qarl.kernels.checksum import Fixed
from qarl.records import Tile, WeightUpdate, WireTensor
from qarl.wire import Spec, Specs, from_wire, named_sums, spec_of

SLOTS = 2
"""Buffers: one is read while the other is filled."""
_ALIGNMENT = 256
"""Bytes: as CUDA's own allocations, so that any dtype's vector loads are whole."""
_CONNECT_S = 60.0
"""For an engine to call once it was told to."""
_GREET_S = 10
_KEEPALIVE = {socket.TCP_KEEPIDLE: 30, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 3}
"""After 30 s of silence a peer's host is asked every 10 s; after three questions without an answer it is gone."""

Tensors = dict[str, dict[str, Tensor]]


class PeerLost(ConnectionError):
    """The other side of a transfer is gone."""


@dataclass(frozen=True)
class Place:
    """Where one part of a tensor lies in its bucket."""

    name: str
    part: str
    spec: Spec
    offset: int
    """Bytes."""

    def view(self, buffer: Tensor) -> Tensor:
        """The part, in a buffer uint8 of at least its bucket's size."""
        n_bytes = self.spec.n_bytes
        return buffer[self.offset : self.offset + n_bytes].view(self.spec.dtype).view(self.spec.shape)


@dataclass(frozen=True)
class Plan:
    """All tensors of a policy in the order of their publication, in buckets. The tensors of one module share a bucket, since
    engines lay a module out as a whole."""

    buckets: tuple[tuple[Place, ...], ...]

    @classmethod
    def of(cls, specs: Specs) -> Plan:
        """`specs`: in the order in which they will be filled."""
        modules: dict[str, list[str]] = {}
        for name in specs:
            modules.setdefault(module_of(name), []).append(name)
        sizes = {m: sum(_aligned(s.n_bytes) for n in names for s in specs[n].values()) for m, names in modules.items()}
        capacity = max(sizes.values(), default=0)
        buckets: list[list[Place]] = []
        end = capacity
        for module, names in modules.items():
            if end + sizes[module] > capacity:
                buckets.append([])
                end = 0
            for name in names:
                for part, spec in specs[name].items():
                    buckets[-1].append(Place(name, part, spec, end))
                    end += _aligned(spec.n_bytes)
        return cls(tuple(map(tuple, buckets)))

    @property
    def capacity(self) -> int:
        """Bytes of the largest bucket."""
        return max(map(_size, self.buckets), default=0)

    @property
    def specs(self) -> dict[str, dict[str, Spec]]:
        found: dict[str, dict[str, Spec]] = {}
        for place in (p for bucket in self.buckets for p in bucket):
            found.setdefault(place.name, {})[place.part] = place.spec
        return found

    @property
    def n_bytes(self) -> int:
        """Of one version, without the gaps of alignment."""
        return sum(place.spec.n_bytes for bucket in self.buckets for place in bucket)

    def size(self, bucket: int) -> int:
        return _size(self.buckets[bucket])

    def rooms(self, buffers: Sequence[Tensor]) -> list[Tensors]:
        """Each bucket's tensors, in the buffer of its slot."""
        found: list[Tensors] = [{} for _ in self.buckets]
        for i, bucket in enumerate(self.buckets):
            for place in bucket:
                found[i].setdefault(place.name, {})[place.part] = place.view(buffers[i % SLOTS])
        return found


@dataclass(frozen=True)
class Manifest:
    """What the learner says of a version once all of it is on its way."""

    checksums: Mapping[str, Mapping[str, int]]
    """Fused name -> part -> `kernels.checksum.checksum`, computed where the part was made."""
    tiles: tuple[Tile, ...]


class Delivery(Protocol):
    """One version on its way in, whichever way it comes."""

    version: int
    format: str
    contract_hash: str

    @property
    def specs(self) -> Specs:
        """What it brings."""

    def buckets(self) -> Generator[Tensors, None, None]:
        """Tensors to be read, never written, and not after the next bucket was asked for. Raises `SyncError`."""

    def manifest(self) -> Manifest:
        """Once the buckets are read. Raises `SyncError`."""

    def abandon(self) -> None:
        """Nothing more of it will be read."""


class HostDelivery:
    """A `WeightUpdate` in host memory: one bucket."""

    def __init__(self, update: WeightUpdate) -> None:
        self.version, self.format, self.contract_hash = update.version, update.format, update.contract_hash
        self._update = update
        self.specs = {
            name: {part: spec_of(name, part, wire) for part, wire in parts.items()}
            for name, parts in update.tensors.items()
        }

    def buckets(self) -> Generator[Tensors, None, None]:
        yield {n: {p: _arrived(n, p, w) for p, w in parts.items()} for n, parts in self._update.tensors.items()}

    def manifest(self) -> Manifest:
        return Manifest(self._update.checksums, self._update.tiles)

    def abandon(self) -> None:
        pass


class Carrier(Protocol):
    """How the bytes of a bucket cross. Slots count up to `SLOTS`. Methods may raise `PeerLost`."""

    buffers: Sequence[Tensor]
    """uint8, one for each slot."""

    def claim(self, slot: int) -> None:
        """Sender: the slot, which receivers released, may be written by work queued from now on."""

    def push(self, slot: int, n_bytes: int) -> None:
        """Sender: what was written to the slot so far becomes readable to all receivers."""

    def pull(self, slot: int, n_bytes: int) -> None:
        """Receiver: the slot may be read, by work queued from now on."""

    def release(self, slot: int) -> None:
        """Receiver: all that was queued to read the slot is done, or ordered before the next write."""

    def close(self) -> None: ...


class Outlet:
    """The learner's end, for one or more engines."""

    def __init__(self, plan: Plan, carrier: Carrier, peers: Sequence[Connection]) -> None:
        """`peers` know the carrier already; they are told the plan."""
        self.plan, self.carrier, self._peers = plan, carrier, list(peers)
        self._bucket_of = {place.name: i for i, bucket in enumerate(plan.buckets) for place in bucket}
        self._rooms = plan.rooms(carrier.buffers)
        self._fixed = [Fixed([part for parts in room.values() for part in parts.values()]) for room in self._rooms]
        self._tell(plan)

    def begin(self, version: int, format: str, contract_hash: str) -> None:
        """A version is coming. Raises `PeerLost`, as every method."""
        self.version, self._bucket, self._done = version, -1, 0
        self._sums: list[Tensor] = []
        self.wait_s = 0.0
        """Seconds waited for engines to let go of a buffer."""
        self._tell((version, format, contract_hash))

    def room(self, name: str) -> dict[str, Tensor]:
        """Where the parts of this tensor are to be written. Tensors come in the order of the plan."""
        bucket = self._bucket_of[name]
        if bucket != self._bucket:
            if bucket != self._bucket + 1:
                raise ValueError(f"{name} is of bucket {bucket}, which does not follow bucket {self._bucket}")
            if bucket >= SLOTS:
                self._await_release()
            self.carrier.claim(bucket % SLOTS)
            self._bucket, self._done = bucket, 0
        return self._rooms[bucket][name]

    def done(self, name: str) -> None:
        """All parts of this tensor are written, or queued to be."""
        self._done += 1
        if self._done == len(self._rooms[self._bucket]):
            self._sums.append(self._fixed[self._bucket].pending())
            if self._bucket == 0:
                self._await_release()  # engines have agreed to the contract: none will refuse and leave a broadcast waiting
            self.carrier.push(self._bucket % SLOTS, self.plan.size(self._bucket))
            self._tell(self._bucket)

    def checksums(self) -> dict[str, dict[str, int]]:
        """Of all parts, as they were when their bucket was pushed."""
        return named_sums(self.plan.specs, torch.cat(self._sums))

    def announce(self, manifest: Manifest) -> None:
        """All of the version is on its way."""
        self._tell(manifest)

    def finish(self) -> None:
        """Wait until engines have let go of the last buffers."""
        for _ in range(min(SLOTS, len(self.plan.buckets))):
            self._await_release()

    def close(self) -> None:
        for peer in self._peers:
            peer.close()
        self.carrier.close()

    def _tell(self, message: Any) -> None:
        try:
            for peer in self._peers:
                peer.send(message)
        except OSError as gone:
            raise PeerLost(f"an engine is gone: {gone}") from gone

    def _await_release(self) -> None:
        """Until every engine has let go of the oldest buffer."""
        start = time.perf_counter()
        try:
            for peer in self._peers:
                peer.recv()
        except (OSError, EOFError) as gone:
            raise PeerLost(f"an engine is gone: {gone}") from gone
        self.wait_s += time.perf_counter() - start


class Inlet:
    """The engine's end. Each version that comes is a `Delivery`."""

    def __init__(self, peer: Connection, carrier: Carrier) -> None:
        self._peer, self.carrier = peer, carrier
        self.plan: Plan = self._hear("its plan")
        self.specs = self.plan.specs
        self._rooms = self.plan.rooms(carrier.buffers)

    def begin(self) -> Inlet:
        """Waits for a version. Raises `SyncError` where the learner is gone, as every method."""
        self.version, self.format, self.contract_hash = self._hear("a version")
        return self

    def buckets(self) -> Generator[Tensors, None, None]:
        self._release()  # of nothing yet: the version is welcome
        for bucket in range(len(self.plan.buckets)):
            told = self._hear(f"bucket {bucket} of version {self.version}")
            if told != bucket:
                raise SyncError(f"version {self.version}: bucket {told} came in place of bucket {bucket}")
            slot = bucket % SLOTS
            try:
                self.carrier.pull(slot, self.plan.size(bucket))
            except PeerLost as gone:
                raise LineLost(f"version {self.version}: bucket {bucket} did not arrive: {gone}") from gone
            yield self._rooms[bucket]
            self.carrier.release(slot)
            self._release()

    def manifest(self) -> Manifest:
        return self._hear(f"the manifest of version {self.version}", Manifest)

    def abandon(self) -> None:
        """The learner may be waiting for buffers to be released: the line is cut."""
        self.close()

    def close(self) -> None:
        self._peer.close()
        self.carrier.close()

    def _release(self) -> None:
        try:
            self._peer.send(None)
        except OSError as gone:
            raise LineLost(f"the learner is gone in the middle of version {self.version}: {gone}") from gone

    def _hear(self, what: str, kind: type | None = None) -> Any:
        try:
            message = self._peer.recv()
        except (OSError, EOFError) as gone:
            raise LineLost(f"the learner was gone before it sent {what}") from gone
        if kind is not None and not isinstance(message, kind):
            raise SyncError(f"the learner sent {message!r} in place of {what}")
        return message


@dataclass(frozen=True)
class Address:
    """Where a learner waits for engines, and the secret that both sides prove to know: what follows is unpickled."""

    host: str
    port: int
    secret: bytes = field(repr=False)


class Door:
    """Waits for engines to call."""

    def __init__(self, host: str) -> None:
        self._server = socket.create_server((host, 0))
        self.address = Address(host, self._server.getsockname()[1], secrets.token_bytes(32))

    def accept(self, n: int) -> list[Connection]:
        """Connections to `n` engines; other callers are turned away. Raises `TimeoutError`."""
        deadline = time.monotonic() + _CONNECT_S
        found: list[Connection] = []
        while len(found) < n:
            self._server.settimeout(max(deadline - time.monotonic(), 0.001))
            called, _ = self._server.accept()
            try:
                found.append(_connection(called, self._greet))
            except (OSError, EOFError, AuthenticationError):
                continue
        return found

    def close(self) -> None:
        self._server.close()

    def _greet(self, connection: Connection) -> None:
        deliver_challenge(connection, self.address.secret)
        answer_challenge(connection, self.address.secret)


def dial(address: Address) -> Connection:
    """Connect to a learner's door."""

    def greet(connection: Connection) -> None:
        answer_challenge(connection, address.secret)
        deliver_challenge(connection, address.secret)

    return _connection(socket.create_connection((address.host, address.port), timeout=_CONNECT_S), greet)


def _connection(opened: socket.socket, greet: Callable[[Connection], None]) -> Connection:
    """A connection on the socket, once both sides have proved to know the secret, which they get a few seconds for."""
    opened.settimeout(None)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # messages are small, and each is waited for
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host that loses power says no goodbye
    for option, value in _KEEPALIVE.items():
        opened.setsockopt(socket.IPPROTO_TCP, option, value)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", _GREET_S, 0))
    connection = Connection(os.dup(opened.fileno()))
    try:
        greet(connection)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 0))
    except BaseException:
        connection.close()
        raise
    finally:
        opened.close()
    return connection


def _arrived(name: str, part: str, wire: WireTensor) -> Tensor:
    try:
        return from_wire(wire)
    except ValueError as error:
        raise SyncError(f"{name} ({part}) did not arrive whole: {error}") from error


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT) * _ALIGNMENT


def _size(bucket: Iterable[Place]) -> int:
    return max((place.offset + _aligned(place.spec.n_bytes) for place in bucket), default=0)
