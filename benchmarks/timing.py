"""Time and memory on a device, what the device can do at most, and the floors that follow from it."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BUDGET_MS = 30.0
"""Device time of one function in one measurement, warm-up not counted."""
_SAMPLE_MS = 1.0
"""Two events bracket at least this much: they cost microseconds themselves."""
_CLOCK_HZ = 2e9
"""At least the GPU's clock: so many cycles of sleep last at least a second."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """For a file's name: `h200`, `cpu`."""
    return torch.cuda.get_device_name().split()[-1].lower() if torch.cuda.is_available() else "cpu"


def rotated(make: Callable[[], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Sets of inputs, together three times the last-level cache, so that no run finds its inputs there."""
    cache = torch.cuda.get_device_properties().L2_cache_size if torch.cuda.is_available() else 0
    sets = [make()]
    size = sum(t.nbytes for t in sets[0])
    return sets + [make() for _ in range(min(-(-3 * cache // size), 16) - 1)]


class Work:
    """A function, and sets of inputs that it takes in turn; how often a sample calls it and how long the device sleeps before.

    Launches are hidden: the device sleeps while the host queues a sample, so what is measured is the work. A function that
    waits for the device inside shows all the same, as it cannot be queued ahead.
    """

    def __init__(self, run: Callable[..., object], sets: Sequence[tuple]) -> None:
        """Warms up."""
        self.run, self.inputs = run, itertools.cycle(sets)
        for _ in range(len(sets) + 1):
            self()
        on_gpu, self.calls = torch.cuda.is_available(), 3
        if on_gpu:
            torch.cuda.synchronize()
        self.lag_ms = queue_ms = _host_ms(self)
        self.ms = _sampled([self])[0]
        self.lag_ms = max(queue_ms - self.ms, 0.0)
        self.calls = min(max(round(_SAMPLE_MS / self.ms), 1), 32) if on_gpu else 1

    def __call__(self) -> None:
        self.run(*next(self.inputs))


def median_ms(run: Callable[..., object], sets: Sequence[tuple], budget_ms: float = BUDGET_MS) -> float:
    """Median milliseconds of `run(*inputs)` on the device."""
    work = Work(run, sets)
    return statistics.median(_sampled([work] * _rounds([work], budget_ms)))


def against(work: Work, baselines: Mapping[str, Work]) -> dict[str, Any]:
    """Medians of `work` and of each baseline, and of their ratios; the strictest baseline's as `ratio` and `bf16_ms`.

    All take turns (A B A B … A): under load the GPU's clock falls within a fraction of a second, so that only neighbours
    compare. A ratio is a sample over the mean of the baseline's before and after it. `*_quartiles`: the first and third.
    """
    works = [*baselines.values(), work]
    n, width = _rounds(works, BUDGET_MS * len(works)), len(works)
    ms = _sampled(works * n + works[:-1])
    own = ms[width - 1 :: width]
    row: dict[str, Any] = {"ms": statistics.median(own), "ms_quartiles": _quartiles(own)}
    strictest = 0.0
    for i, name in enumerate(baselines):
        theirs = ms[i::width]
        ratios = [b / ((a + c) / 2) for a, b, c in zip(theirs, own, theirs[1:], strict=False)]
        ratio = statistics.median(ratios)
        if len(baselines) > 1:
            row |= {f"{name}_ms": statistics.median(theirs), f"ratio_{name}": ratio}
        if ratio > strictest:
            strictest = ratio
            row |= {"bf16_ms": statistics.median(theirs), "ratio": ratio, "ratio_quartiles": _quartiles(ratios)}
    return row


def _rounds(works: Sequence[Work], budget_ms: float) -> int:
    """How often each is sampled."""
    if not torch.cuda.is_available():
        return 2
    return min(max(round(budget_ms / sum(work.calls * work.ms for work in works)), 5), 50)


def _quartiles(values: Sequence[float]) -> list[float]:
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def _sampled(works: Sequence[Work]) -> list[float]:
    """Milliseconds of one call in a sample of each, one after another."""
    if not torch.cuda.is_available():
        return [_host_ms(work) for work in works]
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in works]
    for work, (start, end) in zip(works, events, strict=True):
        if work.lag_ms:
            torch.cuda._sleep(int(min(1.5 * work.lag_ms * work.calls, 20.0) * _CLOCK_HZ / 1e3))
        start.record()
        for _ in range(work.calls):
            work()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / work.calls for work, (start, end) in zip(works, events, strict=True)]


def _host_ms(work: Work) -> float:
    """Until the call returns: on CPU the work itself, on a GPU the launches."""
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1e3


def peak_bytes(run: Callable[..., object], inputs: tuple) -> int:
    """Largest memory allocated on the GPU during one call, above what was there before; what it returns is in it."""
    free()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(*inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def free() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Ceilings:
    """What this device was seen to do at most."""

    copy_bytes_s: float
    """Of a large copy, bytes read and bytes written."""
    bf16_flop_s: float
    """Of a product of random bf16 matrices of 8192 x 8192. Products of 8 bits are granted twice that."""

    @classmethod
    def measure(cls, tiny: bool) -> Ceilings:
        words, side = (1 << 16, 64) if tiny else (1 << 30, 8192)
        source, target = torch.randn(2, words, device=device(), dtype=torch.bfloat16)
        copy_ms = median_ms(lambda a, b: b.copy_(a), [(source, target)], 3 * BUDGET_MS)
        a, b = torch.randn(2, side, side, device=device(), dtype=torch.bfloat16)
        product_ms = median_ms(torch.mm, [(a, b)], 3 * BUDGET_MS)
        return cls(4 * words / copy_ms * 1e3, 2 * side**3 / product_ms * 1e3)

    def floors(self, n_bytes: float, flop16: float = 0.0, flop8: float = 0.0) -> dict[str, float]:
        """Milliseconds that no version beats: inputs read once and outputs written once; operations at full rate."""
        return {
            "floor_bytes_ms": n_bytes / self.copy_bytes_s * 1e3,
            "floor_flop_ms": (flop16 + flop8 / 2) / self.bf16_flop_s * 1e3,
        }
