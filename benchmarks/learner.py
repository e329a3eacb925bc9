"""A learner's whole step against bf16's: `python -m benchmarks.learner [--only dense experts one_expert_layer] [--tiny]`.

Forward, backward and optimizer of `qarl.trainer.learner.Learner` on one device, on packed sequences; Qwen3-8B's and
Qwen3-30B-A3B's shapes with random weights, cut to as many layers as fit with optimizer state, the latter also to one. Every step
quantizes its weights.
There are two bf16: as transformers computes it (`learner.backend=none`), and aligned (`auto`), which takes the engine's ops between
its products as low-bit learners do, so that only the format differs. Each runs first and again last; ratios to each are over
the mean of these runs. The bars, "whole learner step, w4a16 / int8 <= 1.05x / <= 0.95x bf16", are of `ratio`: over the faster bf16.
Written to `results/learner_h200.json` (by the GPU's name) row by row. Exits 1 where a row failed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import record
from benchmarks.rows import Bar, Report, Row
from benchmarks.timing import device, device_name, free
from qarl import formats
from qarl.algorithm import grpo
from qarl.config import Backend, LearnerConfig, OptimizerConfig
from qarl.records import MicroBatch

FORMATS = ("w4a16", "w8a8_int8", "w8a8_fp8")
BF16: dict[str, Backend] = {"transformers": "none", "aligned": "auto"}
"""Whose bf16: its `learner.backend`."""
BARS = {
    "w4a16": Bar("w4a16 learner step, Qwen3-8B shape", "ratio", 1.05),
    "w8a8_int8": Bar("w8a8_int8 learner step, Qwen3-8B shape", "ratio", 0.95),
}
SHARED: dict[str, Any] = {"vocab_size": 151936, "head_dim": 128, "rms_norm_eps": 1e-6, "max_position_embeddings": 40960}
SHARED |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": False}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {
        **SHARED,
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 6,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "experts": {
        **SHARED,
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 3,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    },
}
MODELS["one_expert_layer"] = MODELS["experts"] | {"num_hidden_layers": 1}
"""A second depth: what a layer takes, apart from embeddings and head. `benchmarks.whole_step` asks."""
TINY = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "head_dim": 32}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
TINY_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}


def measure_model(report: Report, name: str, tiny: bool) -> None:
    """Rows of both bf16, of each format, of both bf16 again; each without and with gradient checkpointing."""
    shape = MODELS[name] | (TINY if tiny else {}) | (TINY_EXPERTS if tiny and "num_experts" in MODELS[name] else {})
    sequences, length, steps = (2, 12, 1) if tiny else (8, 2048, 3)
    batch = make_batch(shape["vocab_size"], sequences, length)
    low_bit: Backend = "emulated" if tiny and device().type == "cpu" else "auto"
    bf16 = [("bf16", backend) for backend in BF16.values()]
    runs = [*bf16, *((format, low_bit) for format in FORMATS), *bf16]
    rows: dict[bool, list[Row]] = {False: [], True: []}
    with random_model(shape) as folder:
        for i, (format, backend) in enumerate(runs):
            started = Lazy(partial(make_learner, folder, format, backend))
            for checkpointing in rows:
                layers = shape["num_hidden_layers"]
                layer = f"{name}, {layers} layers{', checkpointing' if checkpointing else ''}"
                row: Row = {"group": "learner", "layer": layer, "layers": layers, "m": sequences * length}
                row |= {"format": format, "backend": backend}
                row |= {"pass": "again"} if i >= len(runs) - len(bf16) else {}
                bars = (BARS[format],) if name == "dense" and format in BARS else ()
                measure = partial(timed_steps, started, batch, steps, checkpointing)
                rows[checkpointing].append(report.add(row, measure, *bars))
            try:
                started.close()
            except Exception as error:
                report.fail({"group": "learner", "layer": name, "format": format, "pass": "close"}, error)
    for alike in rows.values():
        compare(alike)
    report.judge()
    report.save()


def compare(rows: list[Row]) -> None:
    """Ratios of each row's milliseconds to either bf16's, the mean of its first and last run; `ratio` and `peak_ratio` are to the
    faster one's. None where one of the four runs failed: what is left need not be the faster."""
    runs = {
        name: [row for row in rows if (row["format"], row["backend"]) == ("bf16", backend) and "ms" in row]
        for name, backend in BF16.items()
    }
    if not all(len(found) == 2 for found in runs.values()):
        return
    means = {name: statistics.mean(row["ms"] for row in found) for name, found in runs.items()}
    faster = min(means, key=means.__getitem__)
    for row in rows:
        if "ms" in row:
            row |= {f"ratio_{name}": row["ms"] / ms for name, ms in means.items()}
            row |= {"bf16_ms": means[faster], "ratio": row[f"ratio_{faster}"]}
            row |= {"peak_ratio": row["peak_gb"] / runs[faster][0]["peak_gb"]} if "peak_gb" in row else {}


class Lazy:
    """A learner that is started by the first row that needs it, so that a failure is that row's."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make, self.learner = make, None
        self.held_gb = torch.cuda.memory_allocated() / 1e9 if device().type == "cuda" else 0.0
        """What the learners before it have left behind."""

    def __call__(self) -> Any:
        if self.learner is None:
            self.learner = self.make()
        return self.learner

    def close(self) -> None:
        """Its memory is needed for the next one."""
        learner, self.learner = self.learner, None
        try:
            if learner is not None:
                learner.engine.destroy()
        finally:
            if learner is not None:
                vars(learner).clear()  # hooks of the optimizer hold the learner, and it them
            del learner
            gc.collect()  # once for DeepSpeed's objects, and only then nothing in C++ holds the parameters: `free` is the second
            free()


def make_learner(folder: Path, format: str, backend: Backend) -> Any:
    from qarl.trainer.learner import Learner

    config = LearnerConfig(zero=1, backend=backend, optimizer=OptimizerConfig(lr=1e-6), tokens=1 << 20)
    with random_weights():
        return Learner(config, folder, "bfloat16", formats.get(format), grpo(), 1.0, total_updates=100, seed=0)


def timed_steps(started: Lazy, batch: MicroBatch, steps: int, checkpointing: bool) -> Row:
    """Medians over `steps`, after one that compiles and allocates. `score`: a forward alone, by codes that the step left stale."""
    learner = started()
    if checkpointing:
        learner.model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        learner.model.gradient_checkpointing_disable()
    old = learner.score([batch])[0]  # ratios are then near 1: nothing is clipped, no gradient is zero
    batch = replace(batch, old_logprobs=old, sampler_logprobs=old)
    seconds: list[dict[str, float]] = []
    for step in range(1 + steps):
        if step == 1 and device().type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = now()
        stats = learner.update([batch], batch.n_sequences, batch.n_response_tokens)
        updated = now()
        learner.score([batch])
        seconds.append({"step": updated - before, **stats.seconds, "score": now() - updated})
    median = {key: statistics.median(s[key] for s in seconds[1:]) * 1e3 for key in seconds[0]}
    row: Row = {"backend": learner.aligned.backend} if learner.aligned.covered else {}  # else there is none to choose
    row |= {"ops": "engine" if learner.aligned.follows_engine else "torch", "ms": median.pop("step")}
    row |= {f"{stage}_ms": ms for stage, ms in median.items()}
    row["tokens_per_s"] = len(batch.tokens) / row["ms"] * 1e3
    if device().type == "cuda":
        row |= {"peak_gb": torch.cuda.max_memory_allocated() / 1e9, "held_gb": started.held_gb}
    return row


def now() -> float:
    if device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def make_batch(vocabulary: int, sequences: int, length: int) -> MicroBatch:
    """Packed random sequences, an eighth of each a prompt; not scored yet."""
    rng = np.random.default_rng(0)
    prompt = max(length // 8, 1)
    return MicroBatch(
        tokens=rng.integers(0, vocabulary, sequences * length).astype(np.int32),
        lengths=np.full(sequences, length, np.int32),
        prompt_lengths=np.full(sequences, prompt, np.int32),
        sampler_logprobs=np.zeros(sequences * (length - prompt), np.float32),
        old_logprobs=None,
        advantages=rng.standard_normal(sequences).astype(np.float32),
    )


@contextmanager
def random_model(shape: dict[str, Any]) -> Iterator[Path]:
    """A folder that passes for a model's: its configuration, and empty files for the rest."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(shape))
        for file in ("tokenizer.json", "model.safetensors"):
            (folder / file).touch()
        yield folder


@contextmanager
def random_weights() -> Iterator[None]:
    """Within it transformers draws weights on the device instead of reading them: gigabytes in a moment."""

    def draw(path: Path, revision: str | None = None, output_loading_info: bool = False, **how: Any) -> Any:
        with device():
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), **how)
        return (model, {"missing_keys": [], "mismatched_keys": []}) if output_loading_info else model

    with patch.object(AutoModelForCausalLM, "from_pretrained", draw):
        yield


def summary(report: Report) -> str:
    columns = {
        "layer": "",
        "format": "",
        "pass": "",
        "backend": "",
        "ops": "",
        "ms": ".1f",
        "forward_ms": ".1f",
        "backward_ms": ".1f",
    }
    columns |= {
        "optimizer_ms": ".1f",
        "score_ms": ".1f",
        **{f"ratio_{name}": ".3f" for name in BF16},
        "ratio": ".3f",
        "peak_gb": ".1f",
        "peak_ratio": ".2f",
        "held_gb": ".1f",
    }
    rows = [{"backend": "–", "pass": "", **row} for row in report.rows if "layer" in row]
    return "\n".join([record.table(rows, columns), report.troubles(), report.verdicts()])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(MODELS), default=list(MODELS), help="groups of rows")
    parser.add_argument(
        "--tiny", action="store_true", help="small shapes, seconds on a CPU; written only where --out says"
    )
    parser.add_argument("--out", type=Path, help="JSON file; results/learner_DEVICE.json, where none is given")
    options = parser.parse_args(arguments)
    out = options.out or (None if options.tiny else record.RESULTS / f"learner_{device_name()}.json")
    report = Report(out, {"shapes": {name: MODELS[name] for name in options.only}})
    report.run({name: partial(measure_model, report, name, options.tiny) for name in options.only})
    print("\n" + summary(report))
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
