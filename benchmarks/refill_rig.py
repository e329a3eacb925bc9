"""Learner and engine of `benchmarks.refill` and `benchmarks.faults`: this process publishes, another one serves."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.random_models import config_of, fill
from benchmarks.refill_engine import serve
from benchmarks.timing import device, free
from qarl import carriers
from qarl.batching import pack_to_score
from qarl.formats import QuantFormat
from qarl.fusion import covered_shapes
from qarl.records import RefillReport
from qarl.stages import Stages
from qarl.trainer.aligned import AlignedModel
from qarl.trainer.attention import PACKED
from qarl.trainer.canary import Canary
from qarl.trainer.pocket import build_tokenizer
from qarl.trainer.policy import Policy
from qarl.trainer.publish import publish
from qarl.transfer import Door, PeerLost, Plan
from qarl.wire import published_specs

TILES = 4
CANARIES, CANARY_TOKENS = 4, 16


class Unsummed:
    """In the place of a `checksum.Fixed`: what a sync would take without checksums. Made before a sync is timed: it sums once."""

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
        self._sums: dict[bool, list[Any]] = {}
        """Proved -> what sums each bucket."""

    def hold(self, outlet: Any) -> None:
        """Publish through this line from now on."""
        self._sums = {True: outlet._fixed, False: [Unsummed(table) for table in outlet._fixed]}

    def update(self) -> None:
        """Other weights, as after an optimizer step."""
        self.version += 1
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.ndim > 1 and "embed" not in name:  # with every matrix negated a model computes what it did
                    parameter.neg_()
        self.aligned.invalidate()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def publish(self, outlet: Any, proved: bool = True) -> dict[str, float]:
        """Seconds by stage; what engines are to score lies in `scores` then. Not `proved`: no checksums, tiles or canaries."""
        outlet._fixed = self._sums[proved]
        contract = self.format.contract_hash(covered_shapes(self.shapes, self.format))
        stages, scores = Stages(), None
        outlet.begin(self.version, self.format.name, contract)
        if proved and self.keeps_codes:
            with stages("quantize"):
                for name, weight in self.model.named_parameters():
                    if name in self.aligned.covered:
                        self.aligned.codes(name, weight)
            with stages("canary"):
                scores = self.canary.start(self.batch)
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
        if proved:
            with stages("canary"):
                self.scores = scores() if scores else self.canary(self.batch)
        outlet.finish()
        quantize = seconds["quantize"] + stages.seconds.get("quantize", 0.0)
        return {**seconds, **stages.seconds, "quantize": quantize, "transfer": outlet.wait_s}

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


class Rig:
    """An engine process, a publisher, and the line between them."""

    def __init__(self, model: Any, folder: Path, format: QuantFormat, carrier: str, sleeps: bool = False) -> None:
        self.carrier = carrier
        self.outlet: Any = None
        gpu = 1 if carrier == "broadcast" and torch.cuda.device_count() > 1 else 0
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.engine = context.Process(target=serve, args=(theirs, str(folder), format.name, gpu, sleeps), daemon=True)
        self.engine.start()
        theirs.close()
        self.publisher = Publisher(model, format, keeps_codes=carrier == "ipc")
        self.door = Door("127.0.0.1")
        self.start_s = self.answer()
        self.connect()

    def connect(self) -> None:
        """Hold a fresh line."""
        if self.outlet:
            self.outlet.close()
        self.pipe.send(("connect", self.door.address))
        buffers = carriers.staging(self.publisher.plan.capacity, device())
        self.outlet = carriers.answer(self.door, self.carrier, 1, self.publisher.plan, buffers)
        self.publisher.hold(self.outlet)
        self.answer()

    def ask(self, *question: Any) -> Any:
        self.pipe.send(question)
        return self.answer()

    def answer(self) -> Any:
        told = self.pipe.recv()
        if isinstance(told, BaseException):
            raise told
        return told

    def sync(self, settle: bool = False, proved: bool = True) -> tuple[RefillReport, dict[str, float]]:
        """Weights change, then one sync: what the engine reports, and seconds of all of it and of its stages, the engine's scoring
        of the canaries as `score`. `settle`: the device settles after each stage. Raises what the engine raises."""
        self.publisher.update()
        self.ask("settle", settle)
        Stages.settle = torch.cuda.synchronize if settle and torch.cuda.is_available() else None
        start = time.perf_counter()
        self.pipe.send(("sync", self.publisher.canaries if proved else []))
        try:
            learner = self.publisher.publish(self.outlet, proved)
        except PeerLost:
            learner = {}  # the engine says why
        published = time.perf_counter()
        report = self.answer()
        whole = time.perf_counter() - start
        engine = {("score" if stage == "canary" else stage): taken for stage, taken in report.seconds.items()}
        return report, {"whole": whole, "publish": published - start, **learner, **engine}

    def close(self) -> None:
        self.pipe.close()
        self.engine.join(10)
        self.engine.kill()
        self.engine.join()
        self.door.close()
        if self.outlet:
            self.outlet.close()
            self.outlet = None
        self.publisher.release()


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
