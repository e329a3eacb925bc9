"""One rank of an engine in a process of its own: does what it is told over a connection, and sends back what came of it."""

import sys
from multiprocessing.connection import Client, Connection
from typing import Any

import torch

from qarl.rollout.engine import Engine, open_engine


def addresses(engine: Any) -> dict[str, int]:
    """Of everything in the model that a refill brings."""
    slots = engine._refill.slots
    return {f"{n}.{part}": getattr(slots[n].module, param).data_ptr() for n in slots for part, param in slots[n].params.items()}


def forget_a_tensor(engine: Any, name: str) -> None:
    """From now on this rank alone does not load the tensor."""
    load = engine._load
    engine._load = lambda tensors: load({n: parts for n, parts in tensors.items() if n != name})


def version(engine: Engine) -> int | None:
    return engine.version


COMMANDS = {f.__name__: f for f in (addresses, forget_a_tensor, version)}


def serve(connection: Connection, engine: Any) -> None:
    while True:
        name, arguments = connection.recv()
        try:
            answer = COMMANDS[name](engine, *arguments) if name in COMMANDS else getattr(engine, name)(*arguments)
        except Exception as error:
            answer = error
        connection.send(answer)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with Client(sys.argv[1]) as connection:
        opened = open_engine(**connection.recv())
        connection.send(opened.contract_hash())
        try:
            serve(connection, opened)
        except EOFError:
            opened.close()
