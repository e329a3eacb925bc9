"""How far a learner's log-probs are from those of the engine that wrote the tokens: `python -m benchmarks.alignment`.

The real engine samples; then learners that differ in their backend alone score the very same tokens at the very same weights:
`none` computes in floats (a plain BF16/FP32 learner), `emulated` in exact low-bit arithmetic, `engine` with the engine's own
product. Written to `results/alignment_cpu.json`. Where there is a GPU, `benchmarks/alignment_gpu.py` does it instead, at true
widths and at every format (`results/alignment_h200.json`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks import alignment_gpu, record
from qarl.batching import pack_to_score
from qarl.cli import compose
from qarl.config import Backend, RunConfig
from qarl.prepare import prepare
from qarl.records import SyncRequest
from qarl.seeds import completion_seeds

BACKENDS: dict[str, tuple[Backend, ...]] = {"bf16": ("none",), "w8a8_int8": ("none", "emulated", "engine")}
MODELS = {
    "pocket, random": ("recipe=quickstart", "model.pocket.steps=0"),
    "pocket, warm": ("recipe=quickstart",),
    "SmolLM2-135M-Instruct": ("recipe=smollm2_arithmetic",),
}


def cases(trained: str | None) -> Iterator[tuple[str, RunConfig]]:
    """(model, configuration); `trained`: the policy folder of a finished quickstart run."""
    models = dict(MODELS)
    if trained:
        models["pocket, after RL"] = (
            "recipe=quickstart",
            "model=folder",
            f"model.path={trained}",
            "model.dtype=float32",
        )
    for name, overrides in models.items():
        config = compose(*overrides)
        if name == "pocket, after RL":
            config = replace(
                config, model=replace(config.model, max_tokens=compose("recipe=quickstart").model.max_tokens)
            )
        yield name, config


def measure(name: str, config: RunConfig, prompts: int) -> Iterator[dict[str, Any]]:
    """One row a format and backend, of completions that the engine samples once a format."""
    from qarl.bridge import ThroughHost
    from qarl.cluster import LearnerGroup, Sampler, ray_session  # needs Ray, which a GPU's way does not
    from qarl.samples import score, to_samples

    inputs = prepare(config)
    asked, n = inputs.train.take(prompts), config.algorithm.group
    for format, backends in BACKENDS.items():
        run = replace(config, rollout=replace(config.rollout, format=format))
        with ray_session(run):
            completions = None
            for backend in backends:
                learner = LearnerGroup(replace(run, learner=replace(run.learner, backend=backend)), inputs.model)
                learner.wait()
                if completions is None:
                    sampler = Sampler(run, inputs.model, ThroughHost(learner.publish))
                    sampler.wait()
                    nobody, _ = pack_to_score([], learner.ranks, learner.tokens)
                    sampler.refill(SyncRequest(0, run.sync.tiles, nobody, []))
                    seeds = completion_seeds(run.seed, "alignment", 0, prompts, n)
                    completions = sampler.generate(asked, run.rollout.sampling, seeds)
                samples = score(learner, to_samples(asked, completions, np.zeros(len(completions)), "dr_grpo"))
                learner.close()
                yield {"model": name, "format": format, "backend": backend, **gap(samples)}


def gap(samples: list[Any]) -> dict[str, float]:
    delta = np.concatenate([s.old_logprobs - s.completion.logprobs for s in samples])
    return {
        "mean_abs": float(np.abs(delta).mean()),
        "max_abs": float(np.abs(delta).max()),
        "tokens": len(delta),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16, help="prompts, each with the recipe's group of completions")
    parser.add_argument("--models", nargs="*", help="part of the names of models to measure; all, where none is given")
    parser.add_argument("--trained", help="policy folder of a finished quickstart run, for the row after training")
    alignment_gpu.add_arguments(parser.add_argument_group("on a GPU"))
    arguments = parser.parse_args()
    if arguments.tiny or torch.cuda.is_available():
        alignment_gpu.run(arguments)
        return
    rows = []
    for name, config in cases(arguments.trained):
        if arguments.models and not any(part in name for part in arguments.models):
            continue
        for row in measure(name, config, arguments.prompts):
            rows.append(row)
            print(row, flush=True)
    by_case = {(r["model"], r["format"], r["backend"]): r["mean_abs"] for r in rows}
    for row in rows:
        unaligned = by_case[row["model"], row["format"], "none"]
        row["closer_than_unaligned"] = unaligned / row["mean_abs"] if row["mean_abs"] else None
    columns = {"model": "", "format": "", "backend": "", "mean_abs": ".2e", "max_abs": ".2e", "tokens": "d"}
    print(record.table(rows, {**columns, "closer_than_unaligned": ".1f"}))
    print("written to", record.write("alignment_cpu", rows))


if __name__ == "__main__":
    main()
