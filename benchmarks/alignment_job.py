"""One model at one format: `python -m benchmarks.alignment_job FOLDER FORMAT OUT.json`.

The real engine samples at temperature 1, scores its own tokens, and ends; then learners that differ in their backend alone score
the very same tokens at the very same weights. `OUT.json` is written anew after each of them, so a job that is stopped leaves what
it had. `benchmarks.alignment` runs these jobs, several at a time.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import AutoTokenizer

from qarl import formats
from qarl.batching import pack_to_score
from qarl.config import RolloutConfig
from qarl.errors import ConfigError
from qarl.formats import QuantFormat
from qarl.kernels import dispatch
from qarl.records import Completion, Prompt, Sampling
from qarl.rollout.engine import open_engine
from qarl.rollout.vllm_settings import quantization_override
from qarl.rundir import write_atomically
from qarl.seeds import completion_seeds
from qarl.trainer.aligned import AlignedModel
from qarl.trainer.model import load_model
from qarl.trainer.policy import Policy, to_tensors
from qarl.trainer.publish import model_update

SAMPLES = 4
MAX_TOKENS = 512
MAX_SEQUENCES = 32
KV_CACHE_GB = 0.5
MICRO_BATCH_TOKENS = 4096
QUESTIONS = (
    "Tell me a long story about a lighthouse keeper.",
    "Explain step by step how a bicycle stays upright.",
    "Write a poem of twenty lines about winter.",
    "What happened in Europe between 1900 and 1920?",
    "Describe how bread is made, from field to oven.",
    "Write a Python function that sorts a list, and explain it.",
    "List thirty animals and where they live.",
    "Compute 17 + 25 - 8 + 31 and show your work.",
)


class Engine(Protocol):
    """What is asked of an engine here."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray) -> list[Completion]: ...
    def score(self, sequences: Sequence[np.ndarray], prompt_lengths: Sequence[int]) -> list[np.ndarray]: ...
    def close(self) -> None: ...


class Job:
    """One (model, format), and the record that is written of it."""

    def __init__(self, folder: Path, format: QuantFormat, out: Path, share: int, source: str) -> None:
        self.folder, self.format, self.out, self.share, self.source = folder, format, out, share, source
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.dtype_name = str(self.dtype).removeprefix("torch.")
        self.record: dict[str, Any] = {"engine": source, "dtype": self.dtype_name, "seconds": {}, "backends": {}}

    def run(self, n_tokens: int) -> None:
        with self.stage("load"):
            base: Any = load_model(self.folder, self.dtype)
            base = base.to(self.device).eval().requires_grad_(False)
        engine = self.refilled(base) if self.source == "refill" else self.exported()
        prompts = make_prompts(self.folder, int(base.config.vocab_size))
        seeds = completion_seeds(0, "alignment", 0, len(prompts), SAMPLES)
        with self.stage("generate"):
            completions = engine.generate(prompts, Sampling(max_tokens=n_tokens), seeds)
        asked = [p.tokens for p in prompts for _ in range(SAMPLES)]
        sequences = [np.concatenate([p, c.tokens]) for p, c in zip(asked, completions, strict=True)]
        lengths = [len(p) for p in asked]
        sampled = np.concatenate([c.logprobs for c in completions])
        with self.stage("engine scores"):
            again = np.concatenate(engine.score(sequences, lengths))
        self.record |= {"tokens": len(sampled), "entropy": float(-sampled.mean()), "engine_self": gap(again - sampled)}
        self.write()
        engine.close()
        del engine
        self.free()
        self.learners(base, sequences, lengths, sampled)

    def refilled(self, base: Any) -> Engine:
        """Our engine, started without weights and filled by `publish`."""
        with self.stage("publish"):
            update = model_update(base, self.format, 0, n_tiles=2)
        config = RolloutConfig(
            format=self.format.name,
            gpu_memory=0.8 / self.share,
            kv_cache_gb=KV_CACHE_GB,  # fixed: beside other jobs on one GPU, vLLM would count their memory as its own
            max_sequences=MAX_SEQUENCES,
        )
        with self.stage("start"):
            engine = open_engine(config, self.folder, self.dtype_name, MAX_TOKENS)
        with self.stage("refill"):
            report = engine.refill(update)
        self.record["max_tile_error"] = report.max_tile_error
        return engine

    def exported(self) -> Engine:
        """vLLM on the exported checkpoint: where a refill is in doubt."""
        from benchmarks.stock_engine import StockEngine
        from qarl.compressed import write_checkpoint

        folder = self.out.with_suffix(".export")
        shutil.rmtree(folder, ignore_errors=True)  # of a job that was killed
        with self.stage("export"):
            write_checkpoint(self.folder, folder, self.format, quantization_override(self.format))
        with self.stage("start"):
            engine = StockEngine(folder, self.format, self.dtype_name, MAX_TOKENS, 0.8 / self.share, KV_CACHE_GB)
        shutil.rmtree(folder)
        return engine

    def learners(self, base: Any, sequences: list[np.ndarray], lengths: list[int], sampled: np.ndarray) -> None:
        """One after another; one that fails is recorded and the others go on."""
        routed: dict[str, list[torch.Tensor]] = {}
        for backend in self.backends():
            result: dict[str, Any] = {}
            self.record["backends"][backend] = result
            started = time.perf_counter()
            try:
                values, routed[backend] = self.logprobs(base, backend, sequences, lengths)
                result |= gap(values - sampled)
                if routed[backend] and "none" in routed:
                    result["routed_otherwise_than_none"] = flips(routed["none"], routed[backend])
            except Exception as error:  # a result too: it goes into the record, whole
                traceback.print_exc()
                result["error"] = f"{type(error).__name__}: {error}"[:500]
            result["seconds"] = time.perf_counter() - started
            self.write()
            self.free()

    def backends(self) -> list[str]:
        """Those that run here, `none` first and then `auto`; the others' reasons are recorded."""
        if not self.format.quantizes:
            return ["none", "auto"]
        asked = dispatch.backends(self.format.name, self.device.type, self.dtype)
        self.record["refused"] = {name: why for name, why in asked.items() if why is not None}
        # `auto` takes `engine` wherever that runs.
        return ["none", "auto", *(name for name, why in asked.items() if why is None and name != "engine")]

    @torch.no_grad()
    def logprobs(
        self, base: Any, backend: str, sequences: list[np.ndarray], lengths: list[int]
    ) -> tuple[np.ndarray, list[torch.Tensor]]:
        """float32 [R] of all responses, and the experts chosen, layer by layer (none in a dense model)."""
        model = copy.deepcopy(base)
        aligned = AlignedModel(model, self.format, backend, self.device.type, self.dtype)
        self.record["backends"][backend]["computes"] = aligned.describe()
        routed = watch_routers(model)
        policy = Policy(model, 1.0, 1024)
        batch, order = pack_to_score(sequences, 1, MICRO_BATCH_TOKENS, lengths)
        values = [
            policy(to_tensors(micro, self.device))[0].float().cpu().numpy()[: micro.n_response_tokens]
            for micro in batch.ranks[0]
        ]
        return np.concatenate(order.unpack([values])), routed

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        print(f"{name} …", file=sys.stderr, flush=True)
        started = time.perf_counter()
        yield
        self.record["seconds"][name] = time.perf_counter() - started

    def write(self) -> None:
        write_atomically(self.out, json.dumps(self.record, indent=1) + "\n")


def make_prompts(folder: Path, vocabulary: int) -> list[Prompt]:
    """Eight: questions where the model knows words, else random tokens of lengths 4 to 60."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = []
    for i, question in enumerate(QUESTIONS):
        if len(tokenizer) > vocabulary // 2:
            message = [{"role": "user", "content": question}]
            text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            text, tokens = "", np.random.default_rng(i).integers(6, vocabulary, 4 + 8 * i)
        prompts.append(Prompt(id=i, text=text, tokens=np.array(tokens, np.int32), answer=""))
    return prompts


def gap(delta: np.ndarray) -> dict[str, float]:
    """Nats a token."""
    size = np.abs(delta)
    return {
        "mean_abs": float(size.mean()),
        "p99_abs": float(np.quantile(size, 0.99)),
        "max_abs": float(size.max()),
        "mean": float(delta.mean()),
    }


def watch_routers(model: torch.nn.Module) -> list[torch.Tensor]:
    """A list that every forward of a router appends to: the experts it chose, sorted, [T, k]."""
    chosen: list[torch.Tensor] = []

    def keep(module: Any, inputs: Any, outputs: Any) -> None:
        chosen.append(outputs[-1].sort(-1).values.cpu())

    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(keep)
    return chosen


def flips(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Share of (token, layer) whose sets of experts differ."""
    return float(torch.cat([(a != b).any(-1) for a, b in zip(one, other, strict=True)]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="model in Hugging Face layout")
    parser.add_argument("format", choices=list(formats.FORMATS))
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--tokens", type=int, default=256, help="of a completion")
    parser.add_argument("--share", type=int, default=1, help="jobs on this GPU at a time")
    parser.add_argument(
        "--engine-from", choices=("refill", "export"), default="refill", help="where its weights come from"
    )
    arguments = parser.parse_args()
    job = Job(arguments.folder, formats.get(arguments.format), arguments.out, arguments.share, arguments.engine_from)
    try:
        job.run(arguments.tokens)
    except ConfigError as error:  # this machine or this model cannot do the format: that is a result
        job.record["refusal"] = str(error)
        job.write()


if __name__ == "__main__":
    main()
