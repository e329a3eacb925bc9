"""What a dense layer could take at best on a device whose ceilings are known: M tokens, N output and K input features."""

from __future__ import annotations

from benchmarks.rows import Row
from benchmarks.timing import Ceilings
from qarl import formats


def dense_floors(ceilings: Ceilings, m: int, n: int, k: int, name: str, training: bool) -> Row:
    """Forward: x and codes in, y out. Backward: dy, codes and x in, dx and dweight out. Only a w8a8 forward runs in 8 bits."""
    codes = n * k * formats.get(name).bits_per_weight((n, k)) / 8
    n_bytes, flop = 2 * m * (k + n) + codes, 2.0 * m * n * k
    if training:
        n_bytes += 2 * m * (n + 2 * k) + codes + 2 * n * k
    low = name.startswith("w8a8")
    return ceilings.floors(n_bytes, flop * (2 * training + (not low)), flop * low)


def ideal_ratio(ceilings: Ceilings, m: int, k: int, bf16_ms: float, forward_share: float) -> float:
    """The ratio to bf16 of an ideal w8a8 layer: a bar below it is hardly in reach on this device.

    x [M, K] is quantized at copy bandwidth, 2 bytes read and 1 written of each element; the forward's product then takes half
    of bf16's time, and the backward's all of it. `forward_share`: of `bf16_ms`, what the forward takes. No strict bound: clocks
    differ between bf16 and 8 bits, and ratios were measured up to 0.02 below it.
    """
    tokens_ms = ceilings.floors(3 * m * k)["floor_bytes_ms"]
    return tokens_ms / bf16_ms + 1 - forward_share / 2
