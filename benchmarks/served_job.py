"""One format of one model: `python -m benchmarks.served_job FORMAT OUT.json FOLDER FOLDER …`, a folder for each refill.

What `benchmarks.served` says of it; the two engines take turns in one process.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.alignment_job import KV_CACHE_GB, MAX_SEQUENCES, Engine, make_prompts
from benchmarks.stock_engine import StockEngine
from qarl import formats
from qarl.compressed import write_checkpoint
from qarl.config import RolloutConfig
from qarl.formats import QuantFormat
from qarl.records import Completion, Prompt, Sampling
from qarl.rollout.engine import open_engine
from qarl.rollout.vllm_settings import quantization_override
from qarl.rundir import write_atomically
from qarl.trainer.model import load_model
from qarl.trainer.publish import model_update

MAX_TOKENS = 256
GREEDY = Sampling(temperature=0, max_tokens=64)
#: Share that an engine may ask for: several jobs are on one GPU.
GPU_MEMORY = 0.1
#: Times that each engine does the same again: the spread of one engine against itself.
REPEATS = 3


@dataclass
class Served:
    """What one engine answered with one policy."""

    completions: list[Completion]
    sequences: list[np.ndarray]
    """Prompt and completion; of the refilled engine, whichever engine this is."""
    scores: list[np.ndarray]
    """[REPEATS], float32 [R]: log-probs of the responses in `sequences`, nats."""
    drawn: list[np.ndarray]
    """[REPEATS], float32 [R]: log-probs that came with the completions; fewer where greedy tokens changed between repeats."""

    def spread(self) -> float:
        """Largest difference between two identical requests, nats."""
        return max(
            float(np.abs(a - b).max())
            for values in (self.scores, self.drawn)
            for i, a in enumerate(values)
            for b in values[:i]
        )


def ask(engine: Engine, prompts: Sequence[Prompt], sequences: list[np.ndarray] | None) -> Served:
    """Greedy completions and scores, `REPEATS` times; scores are those of its own completions where `sequences` is None."""
    seeds = np.zeros((len(prompts), 1), np.int64)
    answers = [engine.generate(prompts, GREEDY, seeds) for _ in range(REPEATS)]
    first = answers[0]
    drawn = [np.concatenate([c.logprobs for c in again]) for again in answers if tokens(again) == tokens(first)]
    if sequences is None:
        sequences = [np.concatenate([p.tokens, c.tokens]) for p, c in zip(prompts, first, strict=True)]
    lengths = [len(p.tokens) for p in prompts]
    scores = [np.concatenate(engine.score(sequences, lengths)) for _ in range(REPEATS)]
    return Served(first, sequences, scores, drawn)


def tokens(completions: Sequence[Completion]) -> list[list[int]]:
    return [c.tokens.tolist() for c in completions]


def refilled(folders: Sequence[Path], format: QuantFormat, device: torch.device, dtype: torch.dtype) -> list[Served]:
    """One engine without weights of its own, refilled from every folder in turn."""
    engine, found = None, []
    name = str(dtype).removeprefix("torch.")
    for version, folder in enumerate(folders):
        model: Any = load_model(folder, dtype)
        update = model_update(model.to(device), format, version, n_tiles=2)
        if engine is None:
            prompts = make_prompts(folder, int(model.config.vocab_size))
            config = RolloutConfig(
                format=format.name, gpu_memory=GPU_MEMORY, kv_cache_gb=KV_CACHE_GB, max_sequences=MAX_SEQUENCES
            )
            engine = open_engine(config, folder, name, MAX_TOKENS)
        engine.refill(update)
        found.append(ask(engine, prompts, None))
        del model, update
    assert engine is not None
    engine.close()
    return found


def exported(folder: Path, draft: Path, format: QuantFormat, dtype: str, sequences: list[np.ndarray]) -> Served:
    """A fresh engine of vLLM's own on the exported checkpoint."""
    shutil.rmtree(draft, ignore_errors=True)  # of a job that was killed
    write_checkpoint(folder, draft, format, quantization_override(format))
    engine = StockEngine(draft, format, dtype, MAX_TOKENS, GPU_MEMORY, KV_CACHE_GB)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    found = ask(engine, make_prompts(folder, vocabulary), sequences)
    engine.close()
    shutil.rmtree(draft)
    return found


def compare(ours: Served, fresh: Served) -> dict[str, Any]:
    """One refill: equal sequences, and how far apart log-probs are, in nats; `drawn` only where all tokens are equal."""
    same = [a == b for a, b in zip(tokens(ours.completions), tokens(fresh.completions), strict=True)]
    scores = np.abs(ours.scores[0] - fresh.scores[0])
    return {
        "sequences": len(same),
        "same_sequences": sum(same),
        "tokens": len(ours.scores[0]),
        "gap_scores": float(scores.max()),
        "gap_drawn": float(np.abs(ours.drawn[0] - fresh.drawn[0]).max()) if all(same) else None,
        "spread_refilled": ours.spread(),
        "spread_fresh": fresh.spread(),
        "repeats_with_other_tokens": 2 * REPEATS - len(ours.drawn) - len(fresh.drawn),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=list(formats.FORMATS))
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("folders", type=Path, nargs="+", help="policies in Hugging Face layout, of one architecture")
    arguments = parser.parse_args()
    format = formats.get(arguments.format)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    refills: list[dict[str, Any]] = []
    ours = refilled(arguments.folders, format, device, dtype)
    for folder, mine in zip(arguments.folders, ours, strict=True):
        gc.collect()
        torch.cuda.empty_cache()
        draft = arguments.out.with_suffix(".export")
        fresh = exported(folder, draft, format, str(dtype).removeprefix("torch."), mine.sequences)
        refills.append(compare(mine, fresh))
        write_atomically(arguments.out, json.dumps({"refills": refills}, indent=1) + "\n")


if __name__ == "__main__":
    main()
