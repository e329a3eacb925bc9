"""How fast each format generates at Qwen3-30B-A3B's true shape, log-probs on, and what our engine's settings cost.

    python -m benchmarks.rollout                    our engine, then plain vLLM -> results/rollout_<gpu>.json
    python -m benchmarks.rollout --backends qarl    our engine alone
    python -m benchmarks.rollout --tiny             narrow and four layers deep, on whatever is here; written only where --out says

`qarl` is the product's engine, with the kernels, graphs and patches that a learner can follow; `stock` is vLLM as it comes,
compiled and fused as it likes, on the same model and quantization (its int8 experts, in vLLM 0.26, leave activations in
bfloat16). Weights are random and made where they are used; no sequence ends early. A batch is timed from the first request to the
last token, with the prefill of prompts of 64 random tokens; a row is the median of three, with the least and the most. Each engine
has a process of its own, and the next one imports vLLM meanwhile. Rows are written as they come.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from benchmarks.rollout_engines import BACKENDS, Engine
from benchmarks.rows import Report, Row
from qarl import formats
from qarl.errors import ConfigError

PROMPT_TOKENS = 64
WARM_UP_TOKENS = 8


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="*", choices=list(formats.FORMATS), default=list(formats.FORMATS))
    parser.add_argument("--backends", nargs="*", choices=list(BACKENDS), default=list(BACKENDS))
    parser.add_argument("--sequences", nargs="*", type=int, default=[32, 128, 512], help="generated at a time")
    parser.add_argument("--tokens", type=int, default=256, help="new ones of a sequence")
    parser.add_argument("--repeats", type=int, default=3, help="batches timed for a row")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds to wait for a row")
    parser.add_argument("--tiny", action="store_true", help="narrow, four layers, for a test")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    from benchmarks.refill_rig import make_folder
    from benchmarks.timing import device_name

    layers = 4 if arguments.tiny else arguments.layers
    sizes = {"layers": layers, "prompt_tokens": PROMPT_TOKENS, "new_tokens": arguments.tokens}
    out = arguments.out or (None if arguments.tiny else record.RESULTS / f"rollout_{device_name()}.json")
    report = Report(out, more={**sizes, "repeats": arguments.repeats})
    with tempfile.TemporaryDirectory(prefix="rollout-") as folder:
        make_folder(Path(folder), layers, arguments.tiny)
        tasks = [(backend, format) for backend in arguments.backends for format in arguments.formats]
        children: list[Child] = []
        try:
            for index, (backend, format) in enumerate(tasks):
                for task in tasks[len(children) : index + 2]:
                    children.append(
                        Child(*task, folder, tuple(arguments.sequences), arguments.tokens, arguments.repeats)
                    )
                children[index].go()
                for n in arguments.sequences:
                    row = {"format": format, "backend": backend, "m": n}
                    report.add(row, lambda child=children[index]: child.answer(arguments.limit))  # type: ignore[misc]
                children[index].end()
        finally:
            for child in children:
                child.end()
    compare(report.rows)
    report.save()
    print(record.table(report.rows, COLUMNS))
    print(report.troubles())
    return 1 if report.failed else 0


COLUMNS = {
    "backend": "",
    "format": "",
    "m": "",
    "tokens_s": ",.0f",
    "tokens_s_min": ",.0f",
    "tokens_s_max": ",.0f",
    "over_bf16": ".2f",
    "over_stock": ".2f",
    "start_s": ".1f",
}


def compare(rows: Sequence[Row]) -> None:
    """Tokens a second over those of the same engine at bf16, and over those of stock vLLM, with as many sequences."""
    speed = {(row["backend"], row["format"], row["m"]): row.get("tokens_s") for row in rows}
    for row in rows:
        others = {"over_bf16": (row["backend"], "bf16", row["m"])}
        if row["backend"] != "stock":
            others["over_stock"] = ("stock", row["format"], row["m"])
        for key, other in others.items():
            if row.get("tokens_s") and speed.get(other):
                row[key] = row["tokens_s"] / speed[other]


class Child:
    """An engine's process: it imports vLLM at once, and touches the GPU when it is told to go."""

    def __init__(self, *task: Any) -> None:
        """`task`: what `serve` takes behind its pipe."""
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *task))
        self.process.start()
        theirs.close()
        self.error: Exception | None = None

    def go(self) -> None:
        self.pipe.send(None)

    def answer(self, limit: float) -> Row:
        """The next row. Raises the engine's error, also for all rows after it."""
        if self.error is None:
            try:
                told = self.pipe.recv() if self.pipe.poll(limit) else TimeoutError(f"no row in {limit:.0f} s")
            except EOFError:
                self.process.join()
                told = RuntimeError(f"the engine's process ended with code {self.process.exitcode}")
            if not isinstance(told, Exception):
                return told
            self.error = told
        raise self.error

    def end(self) -> None:
        """And with it what it started, since stock vLLM computes in a process of its own; their GPU memory is free then."""
        self.pipe.close()
        assert self.process.pid
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        deadline = time.monotonic() + 10
        with suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(self.process.pid, 0)
                time.sleep(0.05)


def serve(
    pipe: Connection,
    backend: str,
    format: str,
    folder: str,
    sequences: tuple[int, ...],
    n_tokens: int,
    repeats: int,
) -> None:
    """The life of a child: a row for each number of sequences, or an error and its end."""
    os.setpgid(0, 0)
    make = BACKENDS[backend]
    for name, value in make.environment().items():
        os.environ.setdefault(name, value)
    import vllm.engine.arg_utils  # noqa: F401

    with suppress(EOFError):  # of a benchmark that was stopped
        pipe.recv()
        _rows(pipe, make, format, folder, sequences, n_tokens, repeats)
        pipe.recv()


def _rows(
    pipe: Connection,
    make: type[Engine],
    format: str,
    folder: str,
    sequences: tuple[int, ...],
    n_tokens: int,
    repeats: int,
) -> None:
    try:
        start = time.perf_counter()
        engine = make(folder, formats.get(format), max(sequences), PROMPT_TOKENS + n_tokens)
        start_s = time.perf_counter() - start
        for n in sequences:
            pipe.send({**measure(engine, n, n_tokens, repeats), "start_s": start_s})
    except ConfigError as refusal:
        pipe.send(refusal)
    except Exception as error:  # others might not survive the pipe
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"[:500]))


def measure(engine: Engine, n_sequences: int, n_tokens: int, repeats: int) -> Row:
    """Tokens a second: the median of batches, the least and the most. Each has prompts of its own: a cache may hold the others'."""
    shape = (1 + repeats, n_sequences, PROMPT_TOKENS)
    warm_up, *batches = np.random.default_rng(n_sequences).integers(6, 500, shape).astype(np.int32)
    engine.generate(warm_up, WARM_UP_TOKENS)
    seconds = []
    for prompts in batches:
        start = time.perf_counter()
        tokens = engine.generate(prompts, n_tokens)
        seconds.append(time.perf_counter() - start)
        if tokens != n_sequences * n_tokens:
            raise RuntimeError(f"{tokens} tokens instead of {n_sequences} x {n_tokens}")
    speed = [n_sequences * n_tokens / taken for taken in seconds]
    spread = {"tokens_s_min": min(speed), "tokens_s_max": max(speed)}
    return {"tokens_s": statistics.median(speed), **spread, "seconds": statistics.median(seconds)}


if __name__ == "__main__":
    sys.exit(main())
