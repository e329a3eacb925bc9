"""Faults put into weight syncs on purpose: `python -m benchmarks.faults [--n 200]`; every one has to be caught, and nothing else.

The engine and the learner's part are those of `benchmarks.refill`, four layers of Qwen3-30B-A3B's widths. After each fault a
clean sync follows, of other weights: it has to pass. A fault counts as caught when the sync is refused, as named when the refusal
says the tensor, bucket, contract or canary that the fault touched.

Canaries are judged by a tolerance of this benchmark's own; a format whose clean syncs already differ by more is refused.
Of each fault that got as far as the canaries, a rounded router above all, the gap is kept, and whether a run's default tolerance
would have seen it too (`by_default`).
"""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import record
from benchmarks.refill_rig import Rig, make_folder, make_policy
from benchmarks.timing import device_name
from qarl import formats
from qarl.cli import fail
from qarl.config import SyncConfig
from qarl.errors import ConfigError, SyncError
from qarl.transfer import PeerLost

LAYERS = 4
CANARY_TOLERANCE = 1e-3
"""Nats a token, stricter than a run's: engine and learner agree to 1e-7 at int8, which is why faults are put into that format."""
DEFAULT_TOLERANCE = SyncConfig().canary_tolerance


def attempt(rig: Rig) -> tuple[str | None, float | None]:
    """One sync: `None`, or what it was refused for; and the gap of the canaries, nats a token, where it got as far as these."""
    try:
        report, _ = rig.sync()
    except SyncError as error:
        rig.connect()
        return str(error), None
    gap = rig.publisher.gap(report.canaries)
    return None if gap <= CANARY_TOLERANCE else f"canaries differ by {gap:.3g} nats", gap


Fault = Callable[[Rig, np.random.Generator], str]
"""Puts itself into the next sync of the rig, undoes itself afterwards, and returns what the refusal has to say."""


def in_flight(rig: Rig, rng: np.random.Generator, spoil: Callable[[Any], None], wanted: Callable[[Any], bool]) -> str:
    """`spoil` a part that is wanted after it was summed and before it is pushed; returns the tensor's name."""
    places = [(i, p) for i, bucket in enumerate(rig.outlet.plan.buckets) for p in bucket if wanted(p)]
    bucket, place = places[rng.integers(len(places))]
    push, n = rig.outlet.carrier.push, 0

    def push_spoiled(slot: int, n_bytes: int) -> None:
        nonlocal n
        if n == bucket:
            spoil(place.view(rig.outlet.carrier.buffers[slot]))
        n += 1
        push(slot, n_bytes)

    rig.outlet.carrier.push = push_spoiled
    return place.name


def flipped_bit(rig: Rig, rng: np.random.Generator) -> str:
    def spoil(values: torch.Tensor) -> None:
        flat = values.view(-1).view(torch.uint8)
        flat[int(rng.integers(len(flat)))] ^= 1 << int(rng.integers(8))

    return in_flight(rig, rng, spoil, lambda place: True)


def scale_off_by_one_ulp(rig: Rig, rng: np.random.Generator) -> str:
    def spoil(values: torch.Tensor) -> None:
        bits = values.view(-1).view(torch.int32 if values.dtype == torch.float32 else torch.int16)
        bits[int(rng.integers(len(bits)))] += 1

    return in_flight(rig, rng, spoil, lambda place: place.part == "weight_scale")


def swapped_rows(rig: Rig, rng: np.random.Generator) -> str:
    """Two experts, or two output channels, in each other's place."""

    def spoil(values: torch.Tensor) -> None:
        one, other = (int(i) for i in rng.choice(len(values), 2, replace=False))
        values[[one, other]] = values[[other, one]]

    return in_flight(rig, rng, spoil, lambda place: len(place.spec.shape) > 1 and place.part == "weight")


def swapped_tensors(rig: Rig, rng: np.random.Generator) -> str:
    """Two parts of one shape in each other's place: norms, mostly."""
    buckets = rig.outlet.plan.buckets
    pairs = {a: b for bucket in buckets for a in bucket for b in bucket if a.offset < b.offset and a.spec == b.spec}
    firsts = list(pairs)
    first = firsts[rng.integers(len(firsts))]

    def spoil(values: torch.Tensor) -> None:
        buffer = next(b for b in rig.outlet.carrier.buffers if b.data_ptr() == values.data_ptr() - first.offset)
        other = pairs[first].view(buffer)
        kept = values.clone()
        values.copy_(other)
        other.copy_(kept)

    return in_flight(rig, rng, spoil, lambda place: place is first)


def inverted_part(rig: Rig, rng: np.random.Generator) -> str:
    """All bits of a part."""
    return in_flight(
        rig, rng, lambda values: values.view(torch.uint8).bitwise_not_(), lambda place: place.part == "weight"
    )


def stale_layer(rig: Rig, rng: np.random.Generator) -> str:
    """The engine leaves a module as it was."""
    names = [name for name, parts in rig.outlet.plan.specs.items() if "weight_scale" in parts]
    name = names[int(rng.integers(len(names)))]
    rig.ask("forget_to_load", name)
    return name.rpartition(".")[0]


def dropped_bucket(rig: Rig, rng: np.random.Generator) -> str:
    """The engine is not told of a bucket."""
    bucket, tell = int(rng.integers(len(rig.outlet.plan.buckets) - 1)), rig.outlet._tell
    rig.outlet._tell = lambda message: None if isinstance(message, int) and message == bucket else tell(message)
    return f"in place of bucket {bucket}"


def truncated_transfer(rig: Rig, rng: np.random.Generator) -> str:
    """The line breaks in the middle."""
    last, push, n = int(rng.integers(1, len(rig.outlet.plan.buckets))), rig.outlet.carrier.push, 0

    def push_until(slot: int, n_bytes: int) -> None:
        nonlocal n
        n += 1
        if n > last:
            for peer in rig.outlet._peers:
                peer.close()
            raise PeerLost("cut")
        push(slot, n_bytes)

    rig.outlet.carrier.push = push_until
    return "the learner was gone"


def another_contract(rig: Rig, rng: np.random.Generator) -> str:
    """Another group size, another grid, or a router that is quantized on one side: other contracts."""
    begin, mine = rig.outlet.begin, rig.publisher.format
    which = rng.integers(3)
    if which == 2:
        covered = {"model.layers.0.mlp.gate": (128, 2048)}
        rig.outlet.begin = lambda version, format, contract: begin(version, format, mine.contract_hash(covered))
    else:
        other = [name for name in formats.FORMATS if name != mine.name][which]
        rig.outlet.begin = lambda version, format, contract: begin(version, other, contract)
    return "contract mismatch"


def quantized_router(rig: Rig, rng: np.random.Generator) -> str:
    """The learner publishes a rounded router, checksum and all, and computes with the exact one."""
    layer, done = int(rng.integers(LAYERS)), rig.outlet.done
    name = f"model.layers.{layer}.mlp.gate"

    def rounded(which: str) -> None:
        if which == name:
            values = rig.outlet.room(name)["weight"]
            scale = values.float().abs().amax(-1, keepdim=True) / 7
            values.copy_((values.float() / scale).round() * scale)
        done(which)

    rig.outlet.done = rounded
    return "canaries differ"


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        flipped_bit,
        scale_off_by_one_ulp,
        swapped_rows,
        swapped_tensors,
        inverted_part,
        stale_layer,
        dropped_bucket,
        truncated_transfer,
        another_contract,
        quantized_router,
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=200, help="faults, each followed by a clean sync")
    parser.add_argument("--format", default="w8a8_int8", choices=[n for n in formats.FORMATS if n != "bf16"])
    parser.add_argument(
        "--tiny", action="store_true", help="narrow, over gloo where there is no GPU; written only where --out says"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    folder = make_folder(Path(tempfile.mkdtemp(prefix="faults-")), LAYERS, arguments.tiny)
    carrier = "ipc" if torch.cuda.is_available() else "broadcast"
    rig = Rig(make_policy(LAYERS, arguments.tiny), folder, formats.get(arguments.format), carrier)
    rng = np.random.default_rng(0)
    names = list(FAULTS)
    rows: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in names}
    gaps: dict[str, list[float]] = {name: [] for name in names}
    first = [attempt(rig), attempt(rig)]
    clean_gap = max((gap for _, gap in first if gap is not None), default=0.0)
    if not clean_gap <= CANARY_TOLERANCE:
        rig.close()
        fail(
            ConfigError(
                f"--format: canaries of {arguments.format} differ by {clean_gap:.3g} nats a token in a clean sync, more than "
                f"{CANARY_TOLERANCE}: they cannot tell a fault here; try w8a8_int8"
            )
        )
    alarms = [alarm for alarm, _ in first if alarm]
    for i in range(arguments.n):
        name = names[i % len(names)]
        said_of = FAULTS[name](rig, rng)
        said, gap = attempt(rig)
        gaps[name] += [] if gap is None else [gap]
        rig.ask("forget_to_load", None)
        rig.connect()  # a fresh outlet: the fault went with the old one
        named = said is not None and said_of in said
        rows[name].update(injected=1, caught=said is not None, named=named)  # as `+=` would not, it keeps a count of 0
        if not named:
            print(f"{name}: wanted {said_of!r}, got {said!r}", flush=True)
        alarm, _ = attempt(rig)
        if alarm:
            alarms.append(alarm)
            print(f"false alarm after {name}: {alarm}", flush=True)
    rig.close()
    table: list[dict[str, Any]] = [{"fault": name, **counts} for name, counts in rows.items()]
    for row in table:
        if found := gaps[row["fault"]]:
            row |= {"canary_gaps": found, "by_default": sum(not gap <= DEFAULT_TOLERANCE for gap in found)}
    print(record.table(table, {"fault": "", "injected": "d", "caught": "d", "named": "d", "by_default": "d"}))
    caught = sum(counts["caught"] for counts in rows.values())
    n_named = sum(counts["named"] for counts in rows.values())
    print(
        f"{caught} of {arguments.n} caught, {n_named} named; {len(alarms)} false alarms in {arguments.n + 2} clean syncs; "
        f"of {sum(map(len, gaps.values()))} that got to the canaries a tolerance of {DEFAULT_TOLERANCE} sees "
        f"{sum(row.get('by_default', 0) for row in table)}"
    )
    out = arguments.out or (None if arguments.tiny else record.RESULTS / f"faults_{device_name()}.json")
    more = {"format": arguments.format, "false_alarms": alarms, "clean": arguments.n + 2}
    more |= {"canary_tolerance": CANARY_TOLERANCE, "default_canary_tolerance": DEFAULT_TOLERANCE}
    if out:
        print("written to", record.write_file(out, table, **more))
    return 0 if caught == n_named == arguments.n and not alarms else 1


if __name__ == "__main__":
    sys.exit(main())
