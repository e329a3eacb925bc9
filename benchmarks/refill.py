"""One weight sync of Qwen3-30B-A3B: a learner's BF16 weights and a running engine on one GPU, or on two.

    python -m benchmarks.refill                      every format, colocated -> results/refill_<gpu>.json
    python -m benchmarks.refill --carrier broadcast  learner on the first GPU, engine on the second, by NCCL; no codes are kept
    python -m benchmarks.refill --cycles 50          50 more syncs of an engine that slept -> results/refill_sleep_<gpu>.json
    python -m benchmarks.refill --tiny               narrow and four layers deep, on whatever is here; written only where --out says

One process holds the policy (random weights of the true shape) as a learner does, publishes it and scores the canaries; the engine,
in a process of its own, is the product's (`benchmarks/refill_rig.py`, `refill_engine.py`). Between syncs all weights change. A sync
is timed from the first word of the learner to the engine's report. Stages are timed in syncs of their own, in which the device
settles after each. A format that fails, as where memory ends, leaves a row with its error. Neither Ray nor DeepSpeed takes part:
gathering from ZeRO's shards is not measured here.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.refill_rig import Rig, make_folder, make_policy
from benchmarks.timing import Ceilings, device_name
from qarl import formats
from qarl.formats import QuantFormat
from qarl.transfer import SLOTS, Plan

#: Seconds of a whole sync, by carrier and format.
BARS = {
    "ipc": {"w4a16": 0.2, "w4a16_g32": 0.2, "w8a8_fp8": 0.3, "w8a8_int8": 0.3, "bf16": 0.3},
    "broadcast": {"w4a16": 0.6},
}
STAGES = ("gather", "quantize", "pack", "transfer", "canary", "wait", "load", "verify", "score")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="*", choices=list(formats.FORMATS), default=list(formats.FORMATS))
    parser.add_argument("--carrier", choices=("ipc", "broadcast"), default="ipc")
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--syncs", type=int, default=9, help="timed, after the first")
    parser.add_argument("--peer", type=float, default=60.0, help="seconds for vLLM's own reload; 0 leaves it out")
    parser.add_argument(
        "--cycles", type=int, default=0, help="cycles of sleep, wake and refill, and what memory they leave"
    )
    parser.add_argument("--tiny", action="store_true", help="narrow, four layers, for a test")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    layers = 4 if arguments.tiny else arguments.layers
    folder = make_folder(Path(tempfile.mkdtemp(prefix="refill-")), layers, arguments.tiny)
    model = make_policy(layers, arguments.tiny)
    ceilings = Ceilings.measure(arguments.tiny)
    name = f"refill{'_sleep' if arguments.cycles else ''}_{device_name()}{'' if arguments.carrier == 'ipc' else '_x2'}"
    out = arguments.out or (None if arguments.tiny else record.RESULTS / f"{name}.json")
    rows: list[dict[str, Any]] = []
    for format in arguments.formats:
        rows.append(measure(model, formats.get(format), folder, arguments, ceilings))
        print(record.table(rows[-1:], COLUMNS), flush=True)
        if out:
            record.write_file(out, rows, copy_bytes_s=ceilings.copy_bytes_s)  # a run that is stopped leaves what it had
    print(record.table(rows, COLUMNS))
    if out:
        print("written to", out)
    return 0 if all("error" not in row for row in rows) else 1


COLUMNS = {
    "format": "",
    "gb": ".1f",
    "median_s": ".3f",
    "worst_s": ".3f",
    "bar_s": ".1f",
    "holds": "",
    "proof_s": ".3f",
    "proof_share": ".2f",
    "proof_share_floor": ".2f",
    "first_s": ".2f",
    "floor_s": ".3f",
    "quantize_s": ".3f",
    "pack_s": ".3f",
    "load_s": ".3f",
    "verify_s": ".3f",
    "canary": ".1e",
    "canaries_s": ".3f",
    "peer_s": ".2f",
}


def measure(
    model: Any, format: QuantFormat, folder: Path, arguments: argparse.Namespace, ceilings: Ceilings
) -> dict[str, Any]:
    """One row: a format, in an engine of its own."""
    row: dict[str, Any] = {"format": format.name, "carrier": arguments.carrier}
    rig = None
    try:
        rig = Rig(model, folder, format, arguments.carrier, sleeps=arguments.cycles > 0)
        plan = rig.publisher.plan
        row |= {"start_s": rig.start_s, "gb": plan.n_bytes / 1e9, "staging_mb": SLOTS * plan.capacity / 1e6}
        sync_floor, proof_floor = floors_s(model, plan, ceilings)
        row |= {"buckets": len(plan.buckets), "floor_s": sync_floor, "proof_floor_s": proof_floor}
        row |= {"first_s": rig.sync()[1]["whole"], "routes": rig.ask("routes")}
        rig.sync()  # kernels compile
        row |= syncs(rig, arguments.syncs)
        row["proof_share"] = row["proof_s"] / row["median_s"]
        row["proof_share_floor"] = proof_floor / (sync_floor + proof_floor)
        bar = BARS[arguments.carrier].get(format.name)
        if bar and not arguments.tiny:
            row |= {"bar_s": bar, "holds": "yes" if row["median_s"] < bar else "NO"}
        if arguments.cycles:
            row["cycles"] = cycles(arguments.cycles, rig)
        if arguments.peer:
            row["peer_s"] = peer(arguments.peer, rig)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
        print(format.name, row["error"], flush=True)
    finally:
        if rig:
            rig.close()
    return row


def syncs(rig: Rig, n: int) -> dict[str, Any]:
    """n syncs and n without their proof, in turn, so that a machine that slows down slows both; three more by stage; the memory
    before and after."""
    before = rig.ask("memory")
    runs, bare = [], []
    for _ in range(n):
        runs.append(rig.sync()[1])
        rig.ask("prove", False)
        bare.append(rig.sync(proved=False)[1]["whole"])
        rig.ask("prove", True)
    settled = [rig.sync(settle=True)[1] for _ in range(3)]
    last, _ = rig.sync()
    whole = [run["whole"] for run in runs]
    median = statistics.median(whole)
    stages = {stage: statistics.median(run.get(stage, 0.0) for run in settled) for stage in STAGES}
    return {
        "canary": rig.publisher.gap(last.canaries),
        "median_s": median,
        "worst_s": max(whole),
        "proof_s": median - statistics.median(bare),
        **{f"{'canaries' if stage == 'canary' else stage}_s": taken for stage, taken in stages.items()},
        "runs": runs,
        "bare": bare,
        "settled": settled,
        "memory": before,
        "memory_after": rig.ask("memory"),
    }


def cycles(n: int, rig: Rig) -> dict[str, Any]:
    """Sleep and refill, which wakes, n times: seconds of each, the memory before and after, and bytes used on the GPU awake and
    asleep, by the learner too: the difference is what sleep frees. Then what it would take to keep the weights in host memory
    instead, which a refill would have to follow all the same."""
    before = rig.ask("memory")
    rows = []
    for _ in range(n):
        slept, asleep_bytes = rig.ask("sleep")
        _, synced = rig.sync()
        rows.append({"sleep": slept, "wake": synced["wake"], "sync": synced["whole"]})
    seconds = {key: statistics.median(row[key] for row in rows) for key in ("sleep", "wake", "sync")}
    after = rig.ask("memory")
    kept = [rig.ask("keep") for _ in range(3)]  # last: it takes the weights' size of host memory
    down, up = (statistics.median(times) for times in zip(*kept, strict=True))
    memory = {"awake_bytes": before["device"], "asleep_bytes": asleep_bytes, "before": before, "after": after}
    return {"n": n, **seconds, **memory, "keep_sleep": down, "keep_wake": up}


def peer(limit: float, rig: Rig) -> float | None:
    """Seconds of vLLM's own `reload_weights`, from tensors made on its GPU; `None` where it takes longer than the limit."""
    rig.pipe.send(("reload", rig.publisher.shapes))
    return rig.answer() if rig.pipe.poll(limit) else None


def floors_s(model: Any, plan: Plan, ceilings: Ceilings) -> tuple[float, float]:
    """At the speed of a copy, on one GPU. A sync: weights read once, what is published written once. Its proof: what is published
    read once by the engine's checksums (the learner's could be taken as codes are written), and by the canaries of either side,
    which go to nearly all experts and leave out the embedding."""
    masters = sum(parameter.nbytes for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight.nbytes
    read = plan.n_bytes + 2 * (plan.n_bytes - embedding)
    return (masters + plan.n_bytes) / ceilings.copy_bytes_s, read / ceilings.copy_bytes_s


if __name__ == "__main__":
    sys.exit(main())
