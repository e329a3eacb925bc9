"""Low-bit kernels against bf16 on the same tensors: `python -m benchmarks.kernels [--only dense head] [--tiny]`.

Shapes of Qwen3-8B and Qwen3-30B-A3B. Each row: median milliseconds on the device, the floor by bytes and by operations at the
rates measured first, and the ratio to bf16, which is run in turn with it: below 1 where low-bit is faster. Written to
`results/kernels_h200.json` (by the GPU's name) row by row. Exits 1 where a row failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import layers, record
from benchmarks.floors import dense_floors, ideal_ratio
from benchmarks.rows import Bar, Report, Row, pivot
from benchmarks.timing import Ceilings, Work, against, device, device_name, free, median_ms, rotated
from qarl import formats
from qarl.kernels.dispatch import load, quantizer

FORMATS = ("w4a16", "w4a16_g32", "w8a8_int8", "w8a8_fp8")
WEIGHTS = {
    "8B gate_up": (24576, 4096),
    "8B down": (4096, 12288),
    "8B qkv": (6144, 4096),
    "30B experts gate_up": (128, 1536, 2048),
    "30B experts down": (128, 2048, 768),
}
TOKENS = {"tokens 16k x 4096": (16384, 4096), "tokens 128k x 2048": (131072, 2048)}
#: (N, K)
LINEARS = {
    "8B qkv": (6144, 4096),
    "8B o": (4096, 4096),
    "8B gate_up": (24576, 4096),
    "8B down": (4096, 12288),
    "30B qkv": (5120, 2048),
    "30B o": (2048, 4096),
}
FEW = 128
"""At so few tokens only the backend that a learner gets is measured."""
ROWS = (FEW, 1024, 8192, 16384, 65536)
#: Where `emulated` is measured too, once, and a step that quantizes the weight.
EMULATED, QUANTIZED = ("8B o", 1024), ("8B gate_up", 16384)

#: As vLLM's linear layers call its op.
PER_TOKEN: dict[str, Any] = {"use_per_token_if_dynamic": True}

BANDWIDTH = Bar("quantize, dequantize: share of copy bandwidth", "share", 0.70, at_least=True)
TRAIN = {
    "w4a16": Bar("w4a16 dense forward + backward, M >= 8192", "ratio", 1.05),
    "w8a8": Bar("w8a8 dense forward + backward, M >= 8192", "ratio", 1 / 1.15),
}
INFER = Bar("w8a8 dense forward, M >= 8192", "ratio", 1 / 1.6)


def quantize(report: Report, ceilings: Ceilings, tiny: bool) -> None:
    """Weights of every format to codes and back, tokens to codes."""
    for layer, shape in {"tiny": (64, 128)}.items() if tiny else WEIGHTS.items():
        weights = rotated(partial(_random, shape))
        for name in FORMATS:
            n_bytes = weights[0][0].numel() * (2 + formats.get(name).bits_per_weight(shape) / 8)
            for what in ("quantize", "dequantize"):
                row = {"group": "quantize", "layer": layer, "format": name, "pass": what}
                report.add(row, partial(_share, _codes_of(name, what, weights), n_bytes, ceilings), BANDWIDTH)
        free()
    for layer, shape in {"tokens tiny": (16, 128)}.items() if tiny else TOKENS.items():
        tokens = rotated(partial(_random, shape))
        n_bytes = tokens[0][0].numel() * 3 + 4 * shape[0]
        for name, backend in layers.contenders(("w8a8_int8", "w8a8_fp8")):
            row = {"group": "quantize", "layer": layer, "format": name, "backend": backend, "pass": "tokens"}
            bars = (BANDWIDTH,) if backend == "fused" else ()  # `engine` is vLLM's own op
            report.add(row, partial(_share, _tokens_of(name, backend, tokens), n_bytes, ceilings), *bars)
        free()


def _codes_of(name: str, what: str, weights: list[tuple]) -> Callable[[], float]:
    def measure() -> float:
        kernel, group = quantizer(name, device().type), formats.get(name).group
        if what == "quantize":
            return median_ms(lambda w: kernel.quantize(w, group), weights)
        codes = [(kernel.quantize(w, group),) for (w,) in weights]
        return median_ms(lambda c: kernel.dequantize(c, group, torch.bfloat16), codes)

    return measure


def _tokens_of(name: str, backend: str, tokens: list[tuple]) -> Callable[[], float]:
    def measure() -> float:
        layers.arithmetic(name, backend)  # refuses
        if backend == "engine":
            from vllm import _custom_ops as ops

            own: dict[str, Callable[..., object]] = {
                "w8a8_int8": ops.scaled_int8_quant,
                "w8a8_fp8": partial(ops.scaled_fp8_quant, **PER_TOKEN),
            }
            return median_ms(own[name], tokens)
        module: Any = load(name, backend)
        return median_ms(module.quantize_tokens, tokens)

    return measure


def _share(measure: Callable[[], float], n_bytes: float, ceilings: Ceilings) -> Row:
    ms, floors = measure(), ceilings.floors(n_bytes)
    return {"ms": ms, **floors, "share": floors["floor_bytes_ms"] / ms}


def dense(report: Report, ceilings: Ceilings, tiny: bool) -> None:
    """Linear layers, forward and forward + backward, beside `F.linear`."""
    for layer, (n, k) in {"tiny": (32, 128)}.items() if tiny else LINEARS.items():
        for m in (5, 16) if tiny else ROWS:
            sets = rotated(partial(_linear, m, n, k))
            once = tiny or (layer, m) == EMULATED, tiny or (layer, m) == QUANTIZED
            forward = _linear_rows(report, ceilings, layer, sets, None, *once)
            _linear_rows(report, ceilings, layer, sets, forward, *once)
            del sets
            free()


def _linear_rows(
    report: Report,
    ceilings: Ceilings,
    layer: str,
    sets: list[tuple],
    forward: Row | None,
    emulated: bool,
    quantized: bool,
) -> Row:
    """Of the forward alone; with `forward`, which is bf16's row of that, of forward + backward. Returns bf16's row."""
    (m, k), n, training = sets[0][0].shape, len(sets[0][1]), forward is not None
    at = {"group": "dense", "layer": layer, "m": m, "pass": "fwd+bwd" if training else "fwd"}
    bf16: dict[str, Work] = {}
    floors = partial(dense_floors, ceilings, m, n, k, training=training)
    make = partial(Work, _passes(F.linear, training), sets)
    plain = report.add({**at, "format": "bf16"}, partial(layers.kept, bf16, "bf16", make, floors("bf16")))
    first = forward or plain
    for name, backend in layers.contenders(layers.FORMATS, emulated):
        if m == FEW and backend != layers.preferred(name):
            continue
        row = {**at, "format": name, "backend": backend}
        bars = _dense_bars(name, backend, m, training)
        judged = bars and "ms" in plain and "ms" in first
        ideal = partial(ideal_ratio, ceilings, m, k, forward_share=first["ms"] / plain["ms"]) if judged else None
        measure = partial(_aligned, name, backend, training, False, sets, floors(name), bf16, ideal)
        report.add({**row}, measure, *bars)
        if training and quantized:
            measure = partial(_aligned, name, backend, training, True, sets, floors(name), bf16)
            report.add({**row, "pass": "quantize+fwd+bwd"}, measure)
    return plain


def _aligned(
    name: str,
    backend: str,
    training: bool,
    quantized: bool,
    sets: list[tuple],
    floors: Row,
    baselines: dict[str, Work],
    ideal: Callable[[float], float] | None = None,
) -> Row:
    """`quantized`: codes are made in each run, as in the first micro-batch of a step; else once, before.

    `ideal`: bf16's milliseconds -> the ratio that an ideal w8a8 layer would have.
    """
    from qarl.kernels.linear import aligned_linear

    arithmetic = layers.arithmetic(name, backend)

    def forward(x: Tensor, weight: Tensor, prepared: Any) -> Tensor:
        prepared = arithmetic.prepare(weight.detach()) if quantized else prepared
        return aligned_linear(x, weight, None, arithmetic, prepared)

    codes = [(*inputs, None if quantized else arithmetic.prepare(inputs[1].detach())) for inputs in sets]
    row = {**against(Work(_passes(forward, training), codes), baselines), **floors}
    if name.startswith("w8a8"):
        row["tokens_ms"] = _tokens_ms(name, backend, *sets[0][0].shape)
        if "bf16_ms" in row:
            row["tokens_ratio"] = row["tokens_ms"] / row["bf16_ms"]
            if ideal is not None:
                row["ideal_ratio"] = ideal(row["bf16_ms"])
    return row


@cache
def _tokens_ms(name: str, backend: str, m: int, k: int) -> float:
    """Milliseconds that quantizing the tokens takes of a product's, alone, as that product does it."""
    module: Any = load(name, backend)
    return median_ms(module.quantize_tokens, rotated(partial(_random, (m, k))))


def _passes(forward: Callable[..., Tensor], training: bool) -> Callable[..., object]:
    """(x, weight, dy, …) -> the forward alone, or with dx and dweight."""

    def run(x: Tensor, weight: Tensor, dy: Tensor, *more: Any) -> object:
        if training:
            return torch.autograd.grad(forward(x, weight, *more), (x, weight), dy)
        with torch.no_grad():
            return forward(x, weight, *more)

    return run


def _dense_bars(name: str, backend: str, m: int, training: bool) -> tuple[Bar, ...]:
    """On the backend that a learner gets, at sizes that a learner has; groups of 128, which recipes use."""
    if m < 8192 or backend != layers.preferred(name):
        return ()
    if training:
        return (TRAIN[name.partition("_")[0]],)
    return () if name == "w4a16" else (INFER,)


def _random(shape: tuple[int, ...]) -> tuple[Tensor]:
    return (layers.leaf(*shape).detach(),)


def _linear(m: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K], weight [N, K], dy [M, N]."""
    return layers.leaf(m, k), layers.leaf(n, k), layers.leaf(m, n).detach()


def summary(report: Report) -> str:
    """What a reader looks at: verdicts first, then ratios and shares as tables."""

    def of(group: str) -> list[Row]:
        return [row for row in report.rows if row["group"] == group and row["format"] != "bf16"]

    def short(row: Row) -> str:
        name = row["format"].replace("w8a8_", "").replace("w4a16", "w4")
        return f"{name}.{row['backend'][:2]}" if row.get("backend") else name

    def column(row: Row) -> str:
        return f"{short(row)} {row['pass'].replace('fwd', 'f').replace('bwd', 'b').replace('quantize', 'q')}"

    plain = [row for row in of("dense") if row["backend"] != "emulated" and "quantize" not in row["pass"]]
    once = [row for row in of("dense") if row not in plain]
    shown: list[tuple[str, str]] = []

    def show(
        title: str, rows: list[Row], index: tuple[str, ...], name: Callable[[Row], str], value: str, spec: str = ".2f"
    ) -> None:
        if rows:
            shown.append((title, pivot(rows, index, name, value, spec)))

    show("share of copy bandwidth (q: quantize, deq: dequantize)", of("quantize"), ("layer",), column, "share")
    show("dense, time / bf16 (f: forward, b: backward)", plain, ("layer", "m"), column, "ratio")
    judged = [
        r for r in plain if r["pass"] == "fwd" and r["backend"] == layers.preferred(r["format"]) and "tokens_ratio" in r
    ]
    show("quantizing the tokens alone, time / bf16 forward", judged, ("layer", "m"), short, "tokens_ratio")
    ideals = [row for row in of("dense") if "ideal_ratio" in row]
    bars = f"{INFER.limit:.3f} f, {TRAIN['w8a8'].limit:.3f} f+b"
    show(f"time / bf16 of an ideal w8a8 layer (bars: {bars})", ideals, ("layer", "m"), column, "ideal_ratio", ".3f")
    show("dense, measured once", once, ("layer", "m", "pass"), short, "ratio")
    show("experts, time / bf16 (the faster)", of("experts"), ("case", "layer"), column, "ratio")
    blocks = [row for row in of("experts") if "ratio_transformers" in row]
    for baseline in ("transformers", "ours"):
        show(f"expert layer, time / bf16 by {baseline}", blocks, ("case",), column, f"ratio_{baseline}")
    show("head, time / dense", of("head"), ("m",), lambda row: "chunked", "ratio")
    tables = [f"{title}\n{table}\n" for title, table in shown]
    return "\n".join([*tables, report.troubles(), report.verdicts()])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {"quantize": quantize, "dense": dense, "experts": layers.experts, "head": layers.head}
    parser.add_argument("--only", nargs="+", choices=list(groups), default=list(groups), help="groups of rows")
    parser.add_argument(
        "--tiny", action="store_true", help="small shapes, seconds on a CPU; written only where --out says"
    )
    parser.add_argument("--out", type=Path, help="JSON file; results/kernels_DEVICE.json, where none is given")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    ceilings = Ceilings.measure(options.tiny)
    print(f"copy {ceilings.copy_bytes_s / 1e12:.3f} TB/s, bf16 {ceilings.bf16_flop_s / 1e12:.1f} TFLOP/s", flush=True)
    out = options.out or (None if options.tiny else record.RESULTS / f"kernels_{device_name()}.json")
    report = Report(out, {"ceilings": asdict(ceilings)})
    report.run({name: partial(groups[name], report, ceilings, options.tiny) for name in options.only})
    print("\n" + summary(report))
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
