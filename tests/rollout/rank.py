"""One rank of an engine in a process of its own: does what it is told over a connection, and sends back what came of it."""

import gc
import os
import sys
from multiprocessing.connection import Client, Connection
from typing import Any
from unittest.mock import patch

import torch

from qarl.kernels.checksum import checksum
from qarl.rollout.engine import Engine, open_engine


def open_refilled(**arguments: Any) -> Engine:
    """An engine without weights."""
    return open_engine(**arguments)


def open_stock(**arguments: Any) -> Engine:
    """An engine whose weights vLLM itself read from a checkpoint, in the format that its config.json says."""
    from vllm.engine import arg_utils

    def as_anyone_would(**settings: Any) -> Any:
        return made(**settings | {"load_format": "auto", "hf_overrides": {}})

    made = arg_utils.EngineArgs
    with patch.object(arg_utils, "EngineArgs", as_anyone_would):
        engine: Any = open_engine(**arguments)
    engine._refusal, engine.version = None, 0
    return engine


def addresses(engine: Any) -> dict[str, int]:
    """Of every tensor the layers and their kernel objects hold: all that a CUDA graph may read."""
    found = {}
    for path, module in engine._refill.model.named_modules():
        method = getattr(module, "quant_method", None)
        experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
        kernel = getattr(getattr(module, "scheme", None), "kernel", None)
        for holder in (module, method, experts, getattr(experts, "quant_config", None), kernel):
            members = {**getattr(holder, "_parameters", {}), **getattr(holder, "__dict__", {})}
            for name, value in members.items():
                if isinstance(value, torch.Tensor):
                    found[f"{path}.{type(holder).__name__}.{name}"] = value.data_ptr()
    return found


def bytes_held(engine: Any) -> dict[str, int]:
    """Checksums of what the layers hold of published tensors; on a CPU, of all tensors they hold."""
    found = {}
    for slot in engine._refill.slots.values():
        module: Any = slot.module
        members = {**module._parameters, **{k: v for k, v in vars(module).items() if isinstance(v, torch.Tensor)}}
        for name, tensor in members.items():
            if tensor is None or name == "weight_shape":  # which nothing reads
                continue
            if not tensor.is_cuda or name in slot.params.values():
                rows = (
                    slot.shape(name)[0] if slot.name in ("model.embed_tokens", "lm_head") else None
                )  # without padding
                found[f"{slot.name}: {name}"] = checksum(tensor.data[:rows])
    return found


def foreign(engine: Any) -> list[str]:
    """Tensors that are not written in place."""
    return sorted(engine._refill.slots.keys() - engine._refill.homes.keys())


def skip(engine: Any, module: str) -> None:
    """From now on this rank does not load the module, and says nothing."""
    load = engine._refill.load
    engine._refill.load = lambda tensors: load({n: p for n, p in tensors.items() if not n.startswith(module)})


def version(engine: Engine) -> int | None:
    return engine.version


def die(engine: Engine) -> None:
    os._exit(1)


COMMANDS = {f.__name__: f for f in (addresses, bytes_held, foreign, skip, version, die)}


def serve(connection: Connection) -> None:
    """(name, positional and keyword arguments) -> what the engine's method, or the function above, returns or raises."""
    engine: Any = None
    while True:
        name, arguments, named = connection.recv()
        try:
            if name.startswith("open_"):
                engine = globals()[name](**named)
                answer = engine.contract_hash()
            elif name == "close":
                answer = engine.close()
                engine = None
                gc.collect()
            elif name in COMMANDS:
                answer = COMMANDS[name](engine, *arguments)
            else:
                answer = getattr(engine, name)(*arguments)
        except Exception as error:
            answer = error
        connection.send(answer)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with Client(sys.argv[1]) as opened:
        try:
            serve(opened)
        except EOFError:
            pass  # nobody asks any more
