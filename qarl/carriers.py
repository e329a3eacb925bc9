"""How the bytes of a bucket cross from the learner to engines: in place on one GPU, or by broadcast to others.

Both sides first hold a connection each (`qarl.transfer.Door`), over which a carrier is agreed upon. A learner that shares its
GPU with an engine gives it handles of the staging buffers themselves (CUDA IPC): nothing is moved. Engines elsewhere have
buffers of their own, filled by NCCL's broadcast, or gloo's where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from qarl.transfer import SLOTS, Address, Door, Inlet, Outlet, PeerLost, Plan, dial

_TIMEOUT = timedelta(minutes=5)
"""Of one broadcast; a peer that died is noticed by its connection long before."""


class SharedMemory:
    """Buffers of one GPU that both processes map. On the device, writes of one and reads of the other are not ordered by any
    stream, so each side waits for its own before it tells the other."""

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self.buffers = buffers

    @classmethod
    def offer(cls, buffers: Sequence[Tensor], peers: Sequence[Connection], host: str) -> SharedMemory:
        """The learner's side: sends the handles of its buffers."""
        for peer in peers:
            peer.send([reduce_tensor(buffer) for buffer in buffers])
        return cls(buffers)

    @classmethod
    def accept(cls, peer: Connection, device: torch.device) -> SharedMemory:
        """The engine's side."""
        return cls([_opened(handle, device) for handle in peer.recv()])

    def claim(self, slot: int) -> None: ...

    def push(self, slot: int, n_bytes: int) -> None:
        torch.cuda.current_stream(self.buffers[slot].device).synchronize()

    def pull(self, slot: int, n_bytes: int) -> None: ...

    def release(self, slot: int) -> None:
        torch.cuda.current_stream(self.buffers[slot].device).synchronize()

    def close(self) -> None:
        self.buffers = ()


class Broadcast:
    """Buffers on each side, and a process group of the learner (rank 0) and the engines."""

    def __init__(self, buffers: Sequence[Tensor], group: Any) -> None:
        self.buffers, self._group = buffers, group
        self._sending: list[Any] = [None] * SLOTS

    @classmethod
    def offer(cls, buffers: Sequence[Tensor], peers: Sequence[Connection], host: str) -> Broadcast:
        """The learner's side. `host`: a name of this node that engines can reach."""
        world = len(peers) + 1
        store = dist.TCPStore(host, 0, world, is_master=True, wait_for_workers=False, timeout=_TIMEOUT)
        for rank, peer in enumerate(peers, start=1):
            peer.send((host, store.port, rank, world, len(buffers[0])))
        for peer in peers:
            peer.recv()  # it has its buffers: who does not come this far must not be waited for below
        return cls(buffers, _group(store, 0, world, buffers[0].device)).met()

    @classmethod
    def accept(cls, peer: Connection, device: torch.device) -> Broadcast:
        """The engine's side."""
        host, port, rank, world, capacity = peer.recv()
        store = dist.TCPStore(host, port, world, is_master=False, wait_for_workers=False, timeout=_TIMEOUT)
        buffers = staging(capacity, device)
        peer.send("ready")
        return cls(buffers, _group(store, rank, world, device)).met()

    def met(self) -> Broadcast:
        """Once all sides are there: NCCL makes its communicator in the first broadcast, waiting without limit for who is not."""
        self.pull(0, 1)
        return self

    def claim(self, slot: int) -> None:
        if self._sending[slot]:
            _wait(self._sending[slot])

    def push(self, slot: int, n_bytes: int) -> None:
        self._sending[slot] = self._broadcast(slot, n_bytes)

    def pull(self, slot: int, n_bytes: int) -> None:
        _wait(self._broadcast(slot, n_bytes))

    def release(self, slot: int) -> None: ...  # NCCL starts a broadcast after what the stream was given before

    def close(self) -> None:
        self._group.abort()  # a broadcast that waits for a dead peer would never end
        self.buffers = ()

    def _broadcast(self, slot: int, n_bytes: int) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        try:
            return self._group.broadcast([self.buffers[slot][:n_bytes]], options)
        except RuntimeError as error:
            raise PeerLost(str(error)) from error


CARRIERS: dict[str, type[SharedMemory | Broadcast]] = {"ipc": SharedMemory, "broadcast": Broadcast}


def answer(door: Door, kind: str, n: int, plan: Plan, buffers: Sequence[Tensor]) -> Outlet:
    """The learner's end of lines to `n` engines, which call at the same time. `buffers`: `staging` of that plan, or those of lines
    before.

    Raises `TimeoutError` where they do not call, `PeerLost` where one dies before its line stands.
    """
    peers = door.accept(n)
    try:
        for peer in peers:
            peer.send(kind)
        carrier = CARRIERS[kind].offer(buffers, peers, door.address.host)
    except (OSError, EOFError) as gone:  # `PeerLost` is one
        raise PeerLost(f"an engine is gone before its line stood: {gone}") from gone
    return Outlet(plan, carrier, peers)


def call(address: Address, device: torch.device) -> Inlet:
    """An engine's end of a line to the learner at that address."""
    peer = dial(address)
    try:
        return Inlet(peer, CARRIERS[peer.recv()].accept(peer, device))
    except BaseException:
        peer.close()  # the learner waits for a word
        raise


def _wait(work: Any) -> None:
    """On a GPU the stream waits, not the host."""
    try:
        work.wait()
    except RuntimeError as error:  # gloo's word for a peer that is gone
        raise PeerLost(str(error)) from error


def staging(capacity: int, device: torch.device) -> list[Tensor]:
    return [torch.empty(capacity, dtype=torch.uint8, device=device) for _ in range(SLOTS)]


def _opened(handle: tuple[Any, tuple[Any, ...]], device: torch.device) -> Tensor:
    """A tensor on memory of another process, which may number its devices otherwise."""
    rebuild, arguments = handle
    there = list(arguments)
    there[_DEVICE_ARGUMENT] = device.index
    return rebuild(*there)


_DEVICE_ARGUMENT = 6
"""Place of the device among what `torch.multiprocessing.reductions.rebuild_cuda_tensor` takes."""


def _group(store: Any, rank: int, world: int, device: torch.device) -> Any:
    """Apart from torch's default group, which in a learner is that of its ranks and in an engine vLLM's."""
    if device.type != "cuda":
        return dist.ProcessGroupGloo(store, rank, world, _TIMEOUT)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _TIMEOUT
    return dist.ProcessGroupNCCL(store, rank, world, options)
