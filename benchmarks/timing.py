"""Time and memory on a device, what the device can do at most, and the floors that follow from it."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BUDGET_MS = 80.0
"""Device time of one measurement, warm-up not counted."""
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


def median_ms(run: Callable[..., object], sets: Sequence[tuple], budget_ms: float = BUDGET_MS) -> float:
    """Median milliseconds of `run(*inputs)` on the device, over the sets in turn.

    Launches are hidden: the device sleeps while the host queues a sample, so what is measured is the work. A function that
    waits for the device inside shows all the same, as it cannot be queued ahead.
    """
    inputs = itertools.cycle(sets)
    for _ in range(len(sets) + 1):
        run(*next(inputs))
    if not torch.cuda.is_available():
        return statistics.median(_host_ms(run, next(inputs)) for _ in range(3))
    torch.cuda.synchronize()
    queue_ms = _host_ms(run, next(inputs))
    first = next(_samples(run, inputs, 1, 3, queue_ms))
    calls = min(max(round(_SAMPLE_MS / first), 1), 32)
    n = min(max(round(budget_ms / (calls * first)), 5), 50)
    return statistics.median(_samples(run, inputs, n, calls, max(queue_ms - first, 0.0)))


def _samples(run: Callable[..., object], inputs: Iterator[tuple], n: int, calls: int, lag_ms: float) -> Iterator[float]:
    """`n` times milliseconds of one of `calls` runs, after a sleep as long as the host lags behind the device."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(n)]
    for start, end in events:
        torch.cuda._sleep(int(min(1.5 * lag_ms * calls, 20.0) * _CLOCK_HZ / 1e3))
        start.record()
        for _ in range(calls):
            run(*next(inputs))
        end.record()
    torch.cuda.synchronize()
    return (start.elapsed_time(end) / calls for start, end in events)


def _host_ms(run: Callable[..., object], inputs: tuple) -> float:
    """Until the call returns: on CPU the work itself, on a GPU the launches."""
    started = time.perf_counter()
    run(*inputs)
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
