"""One weight sync of Qwen3-30B-A3B: a learner's BF16 weights and a running engine on one GPU, or on two.

    python -m benchmarks.refill                      every format that the GPU has room for, colocated -> results/refill_<gpu>.json
    python -m benchmarks.refill --carrier broadcast  learner on the first GPU, engine on the second, by NCCL; no codes are kept
    python -m benchmarks.refill --tiny               narrow and four layers deep, on whatever is here

This process holds the policy (random weights of the true shape) as a learner does, publishes it and scores the canaries; the
engine, in a process of its own, is the product's (`benchmarks/refill_engine.py`). Between syncs all weights change. A sync is timed
from the first word of the learner to the engine's log-probs of the canaries. Stages are timed in syncs of their own, in which
the device settles after each. Neither Ray nor DeepSpeed takes part: gathering from ZeRO's shards is not measured here.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks import record
from benchmarks.random_models import config_of, fill
from benchmarks.refill_engine import serve
from benchmarks.timing import Ceilings, device, device_name, free
from qarl import carriers, formats
from qarl.batching import pack_to_score
from qarl.formats import QuantFormat
from qarl.fusion import covered_shapes
from qarl.stages import Stages
from qarl.trainer.aligned import AlignedModel
from qarl.trainer.attention import PACKED
from qarl.trainer.canary import Canary
from qarl.trainer.pocket import build_tokenizer
from qarl.trainer.policy import Policy
from qarl.trainer.publish import publish
from qarl.transfer import SLOTS, Door, Plan
from qarl.wire import published_specs

TILES = 4
CANARIES, CANARY_TOKENS = 4, 16
#: Seconds of a whole sync, by carrier and format.
BARS = {
    "ipc": {"w4a16": 0.2, "w4a16_g32": 0.2, "w8a8_fp8": 0.3, "w8a8_int8": 0.3, "bf16": 0.3},
    "broadcast": {"w4a16": 0.6},
}


class Unsummed:
    """In the place of a `checksum.Fixed`: what a sync would take without checksums."""

    def __init__(self, table: Any) -> None:
        self.zeros = torch.zeros_like(table.pending())

    def pending(self) -> torch.Tensor:
        return self.zeros


class Publisher:
    """The learner's part of a sync: `trainer.Learner` without an optimizer."""

    def __init__(self, model: Any, format: QuantFormat, keeps_codes: bool = True) -> None:
        """`keeps_codes`: as a learner does whose weights are whole; else codes are made where they are wanted, as under ZeRO-3."""
        self.model, self.format, self.version = model, format, -1
        self.keeps_codes = keeps_codes
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.plan = Plan.of(published_specs(self.shapes, format, torch.bfloat16))
        self.forwards = {module: vars(module).get("forward") for module in model.modules()}
        self.aligned = AlignedModel(model, format, "auto", device().type, torch.bfloat16)
        if not keeps_codes:
            setattr(self.aligned, "_of", lambda name, weight: None)  # noqa: B010
        self.canary = Canary(Policy(model, 1.0, 1024), self.aligned, device())
        rng = np.random.default_rng(0)
        self.canaries = [rng.integers(6, 500, CANARY_TOKENS).astype(np.int32) for _ in range(CANARIES)]
        batch, self.order = pack_to_score(self.canaries, 1, 4096)
        self.batch = batch.ranks[0]
        gc.freeze()  # as the learner does
        self.proved = True
        self.spare: list[Any] = []

    def update(self) -> None:
        """Other weights, as after an optimizer step."""
        self.version += 1
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.ndim > 1:
                    parameter.neg_()
        self.aligned.invalidate()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def publish(self, outlet: Any, proved: bool = True) -> dict[str, float]:
        """Seconds by stage; what engines are to score lies in `scores` then. Not `proved`: no checksums, tiles or canaries."""
        if proved != self.proved:
            self.proved, self.spare, outlet._fixed = (
                proved,
                outlet._fixed,
                self.spare or [Unsummed(t) for t in outlet._fixed],
            )
        contract = self.format.contract_hash(covered_shapes(self.shapes, self.format))
        outlet.begin(self.version, self.format.name, contract)
        manifest, seconds = publish(
            self.model.named_parameters(),
            self.shapes,
            self.format,
            self.version,
            TILES if proved else 0,
            outlet,
            self.aligned.codes if self.keeps_codes else lambda name, weight: None,
        )
        outlet.announce(manifest)
        stages = Stages()
        with stages("canary"):
            if proved:
                self.scores = self.canary(self.batch)
        outlet.finish()
        return {**seconds, "transfer": outlet.wait_s, **stages.seconds}

    def gap(self, served: list[np.ndarray]) -> float:
        mine = np.concatenate(self.order.unpack([self.scores]))
        return float(np.abs(mine - np.concatenate(served)).mean())

    def release(self) -> None:
        """Give the model its own forwards back, and memory to the next format."""
        for module, forward in self.forwards.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward
        self.model.set_attn_implementation(PACKED)
        del self.aligned, self.canary
        free()


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
    out = arguments.out or record.RESULTS / f"refill_{device_name()}{'' if arguments.carrier == 'ipc' else '_x2'}.json"
    rows: list[dict[str, Any]] = []
    for name in arguments.formats:
        rows.append(measure(model, formats.get(name), folder, arguments, ceilings))
        print(record.table(rows[-1:], COLUMNS), flush=True)
        record.write_file(out, rows, copy_bytes_s=ceilings.copy_bytes_s)  # a run that is stopped leaves what it had
    print(record.table(rows, COLUMNS))
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
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    gpu = 1 if arguments.carrier == "broadcast" and torch.cuda.device_count() > 1 else 0
    engine = context.Process(
        target=serve, args=(theirs, str(folder), format.name, gpu, arguments.cycles > 0), daemon=True
    )
    engine.start()
    theirs.close()
    publisher = Publisher(model, format, keeps_codes=arguments.carrier == "ipc")
    door = Door("127.0.0.1")

    def ask(*question: Any) -> Any:
        ours.send(question)
        return answer()

    def answer() -> Any:
        told = ours.recv()
        if isinstance(told, BaseException):
            raise told
        return told

    def sync(settle: bool = False, proved: bool = True) -> dict[str, float]:
        """Weights change, then one sync: seconds of its stages and of all of it."""
        publisher.update()
        ask("settle", settle)
        Stages.settle = torch.cuda.synchronize if settle and torch.cuda.is_available() else None
        start = time.perf_counter()
        ours.send(("sync", publisher.canaries if proved else []))
        learner = publisher.publish(outlet, proved)
        published = time.perf_counter()
        report = answer()
        whole = time.perf_counter() - start
        if proved:
            row["canary"] = publisher.gap(report.canaries)
        engine = {("score" if stage == "canary" else stage): taken for stage, taken in report.seconds.items()}
        return {"whole": whole, "publish": published - start, **learner, **engine}

    outlet = None
    try:
        row["start_s"] = answer()
        ours.send(("connect", door.address))
        outlet = carriers.answer(door, arguments.carrier, 1, publisher.plan, device())
        answer()
        row |= {"gb": publisher.plan.n_bytes / 1e9, "staging_mb": SLOTS * publisher.plan.capacity / 1e6}
        row["buckets"] = len(publisher.plan.buckets)
        row["first_s"] = sync()["whole"]
        row["routes"] = ask("routes")
        sync()  # kernels compile
        row["memory"] = ask("memory")
        runs = [sync() for _ in range(arguments.syncs)]
        settled = [sync(settle=True) for _ in range(3)]
        ask("prove", False)
        bare = [sync(proved=False)["whole"] for _ in range(arguments.syncs)]
        ask("prove", True)
        row["memory_after"] = ask("memory")
        whole = [run["whole"] for run in runs]
        row |= {"median_s": statistics.median(whole), "worst_s": max(whole), "runs": runs, "settled": settled}
        for stage in ("gather", "quantize", "pack", "transfer", "canary", "wait", "load", "verify", "score"):
            row[f"{'canaries' if stage == 'canary' else stage}_s"] = statistics.median(
                run.get(stage, 0.0) for run in settled
            )
        row["proof_s"] = row["median_s"] - statistics.median(bare)
        row["floor_s"] = floor_s(model, publisher, ceilings)
        bar = BARS[arguments.carrier].get(format.name)
        if bar and not arguments.tiny:
            row |= {"bar_s": bar, "holds": "yes" if row["median_s"] < bar else "NO"}
        if arguments.cycles:
            row["cycles"] = cycles(arguments.cycles, ask, sync)
        if arguments.peer:
            row["peer_s"] = peer(arguments.peer, ours, publisher.shapes)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
        print(format.name, row["error"], flush=True)
    finally:
        ours.close()
        engine.join(5)
        engine.kill()
        engine.join()
        if outlet:
            outlet.close()
            del outlet
        publisher.release()
        door.close()
    return row


def cycles(n: int, ask: Any, sync: Any) -> dict[str, Any]:
    """Sleep and refill, which wakes, n times: seconds of each, and the memory before and after."""
    before = ask("memory")
    rows = []
    for _ in range(n):
        asleep, left = ask("sleep")
        synced = sync()
        rows.append({"sleep": asleep, "wake": synced["wake"], "sync": synced["whole"], "left": left})
    seconds = {key: statistics.median(row[key] for row in rows) for key in ("sleep", "wake", "sync")}
    return {"n": n, **seconds, "asleep_bytes": rows[-1]["left"], "before": before, "after": ask("memory")}


def peer(limit: float, ours: Any, shapes: dict[str, tuple[int, ...]]) -> float | None:
    """Seconds of vLLM's own `reload_weights`, from tensors made on its GPU; `None` where it takes longer than the limit."""
    ours.send(("reload", shapes))
    if not ours.poll(limit):
        return None
    told = ours.recv()
    if isinstance(told, BaseException):
        raise told
    return told


def floor_s(model: Any, publisher: Publisher, ceilings: Ceilings) -> float:
    """Weights read once and what is published written once, at the speed of a copy."""
    read = sum(parameter.nbytes for parameter in model.parameters())
    return (read + publisher.plan.n_bytes) / ceilings.copy_bytes_s


def make_folder(folder: Path, layers: int, tiny: bool) -> Path:
    """Configuration and tokenizer, without weights: the engine gets them from the learner."""
    config = config_of("qwen3-30b-a3b-4l", tiny)
    config.num_hidden_layers = layers
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(folder)
    build_tokenizer(config.max_position_embeddings).save_pretrained(folder)
    return folder


def make_policy(layers: int, tiny: bool) -> Any:
    """Random weights in BF16, where the learner computes."""
    config = config_of("qwen3-30b-a3b-4l", tiny)
    config.num_hidden_layers = layers
    with torch.device(device()):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=PACKED)
    generator = torch.Generator(device()).manual_seed(0)
    with torch.no_grad():
        for name, values in model.named_parameters():
            fill(name, values, generator)
    model.config.use_cache = False
    return model.eval().requires_grad_(False)


if __name__ == "__main__":
    sys.exit(main())
