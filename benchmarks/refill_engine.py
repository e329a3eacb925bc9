"""The engine of `benchmarks.refill`, in a process of its own: does what it is asked over a pipe, until that closes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from qarl.fusion import module_of

MAX_SEQUENCES = 8
MAX_TOKENS = 256


def serve(pipe: Connection, folder: str, format: str, gpu: int, sleeps: bool) -> None:
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    from qarl.errors import SyncError

    try:
        start = time.perf_counter()
        engine = Served(folder, format, sleeps)
        pipe.send(time.perf_counter() - start)
        while True:
            asked, *arguments = pipe.recv()
            try:
                pipe.send(getattr(engine, asked)(*arguments))
            except SyncError as error:
                pipe.send(error)
    except EOFError:
        return
    except BaseException as error:
        pipe.send(error if isinstance(error, Exception) else RuntimeError(repr(error)))
        raise


class Served:
    """What the benchmark may ask for."""

    def __init__(self, folder: str, format: str, sleeps: bool) -> None:
        import torch

        from benchmarks.alignment_job import KV_CACHE_GB
        from qarl.config import RolloutConfig
        from qarl.rollout.engine import open_engine

        on_gpu = torch.cuda.is_available()
        config = RolloutConfig(
            engine="vllm" if on_gpu else "torch",
            format=format,
            gpu_memory=0.05,
            kv_cache_gb=KV_CACHE_GB,
            max_sequences=MAX_SEQUENCES,
            sleep=sleeps,
        )
        engine: Any = open_engine(config, folder, "bfloat16", MAX_TOKENS)
        self.engine = engine
        self.worker = engine._core.engine_core.model_executor.driver_worker.worker if on_gpu else None

    def connect(self, address: Any) -> None:
        self.engine.connect(address)

    def sync(self, canaries: Any) -> Any:
        return self.engine.refill_from_line(canaries)

    def prove(self, wanted: bool) -> None:
        """Whether syncs are proved from now on; that they are not shows what the proof costs."""
        for method in ("_prove", "_read_back"):
            vars(self.engine).pop(method, None)
        if not wanted:
            self.engine._prove = lambda *_: 0.0
            self.engine._read_back = lambda _: None

    def sleep(self) -> tuple[float, int]:
        """Seconds, and the bytes then used on the GPU by all processes, as the driver says: torch still counts as reserved what
        vLLM's allocator has given back."""
        start = time.perf_counter()
        self.engine.sleep()
        return time.perf_counter() - start, self.memory()["device"]

    def keep(self) -> tuple[float, float]:
        """Seconds to fall asleep with the weights kept in host memory, and to have them back: vLLM's own way, in place of ours."""
        start = time.perf_counter()
        self.engine._core.sleep(1)
        asleep = time.perf_counter()
        self.engine._core.wake_up()
        return asleep - start, time.perf_counter() - asleep

    def forget_to_load(self, tensor: str | None) -> None:
        """A fault: the module that holds this tensor is left as it was by every sync from now on; `None` mends it."""
        vars(self.engine).pop("_load", None)
        if tensor:
            load, module = self.engine._load, module_of(tensor)
            self.engine._load = lambda tensors: load({n: t for n, t in tensors.items() if module_of(n) != module})

    def settle(self, wanted: bool) -> None:
        import torch

        from qarl.stages import Stages

        Stages.settle = torch.cuda.synchronize if wanted and torch.cuda.is_available() else None

    def routes(self) -> dict[str, int]:
        """How many tensors are written in place, of how many."""
        refill = getattr(self.engine, "_refill", None)
        return {"in_place": len(refill.homes), "tensors": len(refill.slots)} if refill else {}

    def memory(self) -> dict[str, int]:
        """Bytes of this process on the GPU by torch, of all processes by the driver, and resident on the host."""
        import psutil
        import torch

        resident = psutil.Process().memory_info().rss
        if not torch.cuda.is_available():
            return {"resident": resident}
        free, total = torch.cuda.mem_get_info()
        return {"torch": torch.cuda.memory_reserved(), "device": total - free, "resident": resident}

    def reload(self, shapes: dict[str, tuple[int, ...]]) -> float:
        """vLLM's own reload of a checkpoint's tensors, made layer by layer on this GPU as it asks for them."""
        import torch
        from vllm.config import set_current_vllm_config

        assert self.worker is not None
        torch.cuda.synchronize()
        start = time.perf_counter()
        with set_current_vllm_config(self.worker.vllm_config):
            self.worker.reload_weights(weights_iterator=checkpoint(shapes, self.engine.format))
        torch.cuda.synchronize()
        return time.perf_counter() - start


def checkpoint(shapes: dict[str, tuple[int, ...]], format: Any) -> Iterator[tuple[str, Any]]:
    """(name, tensor) as a compressed-tensors checkpoint names them, experts one by one; quantized together."""
    import torch

    from qarl.kernels.dispatch import quantizer

    quantize: Callable[..., Any] | None = quantizer(format.name, "cuda").quantize if format.quantizes else None
    for name, shape in shapes.items():
        weight = torch.randn(shape, dtype=torch.bfloat16, device="cuda") * 0.02
        parts = {"weight": weight}
        if quantize and format.covers(name, shape):
            parts = quantize(weight, format.group)
        stem = name.removesuffix(".weight")
        if len(shape) < 3:
            for part, values in parts.items():
                yield f"{stem}.{part}", values
            if "weight_packed" in parts:
                yield f"{stem}.weight_shape", torch.tensor(shape)
            continue
        path, _, leaf = name.rpartition(".")
        pieces = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
        for expert in range(shape[0]):
            for i, piece in enumerate(pieces):
                for part, values in parts.items():
                    yield f"{path}.{expert}.{piece}.{part}", values[expert].chunk(len(pieces))[i]
                if "weight_packed" in parts:
                    yield f"{path}.{expert}.{piece}.weight_shape", torch.tensor((shape[1] // len(pieces), shape[2]))
