"""Small learner runs, in this process (one rank) or as a script in as many processes as ranks.

    python tests/trainer/scenarios.py RANK WORLD INIT_METHOD FILE.json      {"out folder": arguments of `run`, …}

Starting Python, torch and DeepSpeed takes longer than a run, so one pair of processes makes all runs of two ranks.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from qarl import formats
from qarl.algorithm import grpo
from qarl.batching import pack, pack_to_score
from qarl.config import LearnerConfig, OptimizerConfig
from qarl.records import Completion, Sample
from qarl.trainer.learner import Learner

VOCABULARY = 48
SHAPE: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=128,
)


#: As wide as low-bit products and FlashAttention on a GPU want it.
WIDE: dict[str, Any] = SHAPE | dict(
    hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64, moe_intermediate_size=128
)


def make_model(folder: Path, kind: str, shape: dict[str, Any] = SHAPE) -> Path:
    """A random `dense`, `tied` or `moe` model, with the file that stands for a tokenizer here."""
    torch.manual_seed(0)
    model: Any
    if kind == "moe":
        shape = {"moe_intermediate_size": 32, **shape}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=kind == "tied"))
    for name, parameter in model.named_parameters():  # away from all ones, where a lost norm would not show
        if name.endswith("norm.weight"):
            parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def make_samples(n: int = 8, seed: int = 0) -> list[Sample]:
    """Prompts of 1 to 5 and responses of 1 to 9 random tokens; not scored yet."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(n):
        tokens = rng.integers(0, VOCABULARY, rng.integers(1, 10)).astype(np.int32)
        completion = Completion(i, 0, tokens, np.zeros(len(tokens), np.float32), "", "stop", 0)
        prompt = rng.integers(0, VOCABULARY, rng.integers(1, 6)).astype(np.int32)
        samples.append(Sample(completion, prompt, 0.0, float(rng.standard_normal())))
    return samples


def make_learner(
    model: Path, rank: int = 0, world: int = 1, init_method: str | None = None, **settings: Any
) -> Learner:
    """Settings of the optimizer go to it, `format`, `dtype` and `total_updates` to the learner, the rest to its configuration.

    ZeRO 0 where nothing else is said: one plain optimizer, which the other stages are compared with.
    """
    format = formats.get(settings.pop("format", "bf16"))
    optimizer = OptimizerConfig(**{"lr": 1e-3, "grad_clip": 1e9, **settings.pop("optimizer", {})})
    total, dtype = settings.pop("total_updates", 4), settings.pop("dtype", "float32")
    config = LearnerConfig(optimizer=optimizer, ranks=world, threads=1, **{"logprob_chunk": 7, "zero": 0, **settings})
    return Learner(config, model, dtype, format, grpo(), 0.8, total, 0, rank, world, init_method)


def scored(learner: Learner, samples: list[Sample], tokens: int) -> list[Sample]:
    """With old log-probs from the learner, and a sampler that was a little off."""
    sequences = [np.concatenate([s.prompt_tokens, s.completion.tokens]) for s in samples]
    batch, order = pack_to_score(sequences, learner.world, tokens, [len(s.prompt_tokens) for s in samples])
    everyone: list[Any] = [None] * learner.world
    dist.all_gather_object(everyone, learner.score(batch.ranks[learner.rank]))
    return [with_old(s, old) for s, old in zip(samples, order.unpack(everyone), strict=True)]


def with_old(sample: Sample, old: np.ndarray) -> Sample:
    return replace(sample, completion=replace(sample.completion, logprobs=old + np.float32(0.01)), old_logprobs=old)


def step(learner: Learner, samples: list[Sample], tokens: int) -> Any:
    batch = pack(samples, learner.world, tokens)
    return learner.update(batch.ranks[learner.rank], batch.n_sequences, batch.n_tokens)


def run(
    out: Path,
    model: str,
    tokens: int = 200,
    steps: int = 1,
    load: str | None = None,
    where: tuple = (),
    **settings: Any,
) -> None:
    """Score eight samples, update, save everything a test may compare into `out`."""
    learner = make_learner(Path(model), *where, **settings)
    if load:
        learner.load(Path(load))
    for i in range(learner.updates, learner.updates + steps):
        samples = scored(learner, make_samples(seed=i), tokens)
        stats = step(learner, samples, tokens)
    learner.save(out)
    if learner.rank == 0:
        np.save(out / "logprobs.npy", np.concatenate([s.old_logprobs for s in samples]))
        (out / "stats.json").write_text(json.dumps({"grad_norm": stats.grad_norm, "sums": dict(stats.sums)}))


def result(out: Path) -> dict[str, Any]:
    """What `run` left: `logprobs` in order of the samples, `grad_norm`, `sums`, `masters`, and `gradient`, after one step."""
    moments = tensors(out, "exp_avg")
    return {
        "logprobs": np.load(out / "logprobs.npy"),
        **json.loads((out / "stats.json").read_text()),
        "masters": tensors(out, "masters"),
        "moments": {kind: tensors(out, kind) for kind in ("exp_avg", "momentum_buffer", "state1", "absmax1", "state2")},
        "gradient": {name: moment / (1 - OptimizerConfig().betas[0]) for name, moment in moments.items()},
    }


def tensors(out: Path, kind: str) -> dict[str, torch.Tensor]:
    files = sorted((out / "learner").glob(f"{kind}-*.safetensors"))
    return {name: values for file in files for name, values in load_file(file).items()}


if __name__ == "__main__":
    rank, world, init_method, file = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    for out, arguments in json.loads(Path(file).read_text()).items():
        run(Path(out), where=(rank, world, init_method), **arguments)
