"""What is tried to know what a machine can run: tiny engines that write, tiny learners that go forward and backward on it.

Each function is one trial, called by `qarl.ability` and `qarl.traps` in a process that may die of it. Engine and learner are the
product's own; the models are a Qwen3 and a Qwen3-MoE of two layers with random weights, wide enough for every kernel.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qarl import formats
from qarl.batching import pack_to_score
from qarl.config import LearnerConfig, OptimizerConfig, PocketConfig, RewardConfig, RolloutConfig, RunConfig
from qarl.records import Prompt, Sampling
from qarl.rollout.vllm_settings import ENVIRONMENT
from qarl.sandbox import Broken

for name, value in ENVIRONMENT.items():  # vLLM reads them when it is imported, by whichever trial
    os.environ.setdefault(name, value)

CONTEXT = 128
TEMPERATURE = 0.7
"""Not 1, so that log-probs of another distribution than the sampled one are seen."""
EXPERTS = 8


@dataclass(frozen=True)
class Written:
    """What an engine wrote."""

    sequences: list[np.ndarray]
    """Prompt and response, int32."""
    prompt_lengths: list[int]
    logprobs: np.ndarray
    """float32 [R], of all response tokens: the sampler's."""


def make_models(root: Path) -> None:
    """Folders `root/dense` and `root/experts` in Hugging Face layout."""
    from qarl.trainer.pocket import build_model, build_tokenizer

    tokenizer = build_tokenizer(CONTEXT)
    for name, experts in (("dense", 0), ("experts", EXPERTS)):
        spec = PocketConfig(
            hidden_size=256, layers=2, heads=2, kv_heads=1, head_dim=128, context=CONTEXT, experts=experts
        )
        build_model(spec, tokenizer).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)


def vllm_refusals(dtype: str, experts: bool) -> dict[str, str | None]:
    """Format -> `None`, or why vLLM here refuses it."""
    if find_spec("vllm") is None:
        return dict.fromkeys(formats.FORMATS, "vLLM is not installed")
    from qarl.rollout.capability import supported_formats

    return supported_formats(dtype, experts)


def sample(folder: Path, engine: str, dtype: str, format: str, sleeps: bool = False) -> Written:
    """Tokens of an engine that was refilled twice: through its loader, then, on a GPU, where its weights live. `sleeps`: it gives
    its memory back in between."""
    from qarl.rollout.engine import open_engine
    from qarl.trainer.model import load_model
    from qarl.trainer.publish import model_update

    config = RolloutConfig(
        engine=engine,  # type: ignore[arg-type]
        format=format,
        gpu_memory=0.2,
        kv_cache_gb=0.05,
        max_sequences=4,
        sleep=sleeps,
    )
    policy = load_model(folder, getattr(torch, dtype))
    sampler = open_engine(config, folder, dtype, CONTEXT)
    for version in (0, 1):
        with torch.no_grad():
            for weight in policy.parameters():
                weight.copy_(weight.flip(0))  # version 0 is another policy, version 1 the folder's
        sampler.refill(model_update(policy, formats.get(format), version, n_tiles=2))
        if sleeps and version == 0:
            sampler.sleep()
    drawn = np.random.default_rng(0)
    prompts = [Prompt(i, "", drawn.integers(6, 100, 4 + 20 * i).astype(np.int32), "") for i in range(3)]
    completions = sampler.generate(prompts, Sampling(TEMPERATURE, max_tokens=16), np.arange(3)[:, None])
    sampler.close()
    return Written(
        [np.concatenate([p.tokens, c.tokens]) for p, c in zip(prompts, completions, strict=True)],
        [len(p.tokens) for p in prompts],
        np.concatenate([c.logprobs for c in completions]),
    )


def backends(dtype: str, format: str) -> tuple[dict[str, str | None], str]:
    """Backend of a learner here -> `None`, or why it is refused; and the one that `auto` takes."""
    from qarl.kernels import dispatch

    where = (device().type, getattr(torch, dtype))
    return dispatch.backends(format, *where), dispatch.choose(format, "auto", *where)


def learn(folder: Path, backend: str, dtype: str, format: str, written: Written) -> float:
    """Mean |Δ log-prob| in nats a token, of a learner's forward against the sampler, once its backward has reached all weights."""
    from qarl.trainer.aligned import AlignedModel
    from qarl.trainer.model import load_model
    from qarl.trainer.policy import Policy, to_tensors

    model: Any = load_model(folder, getattr(torch, dtype))
    model.to(device())
    AlignedModel(model, formats.get(format), backend, device().type, getattr(torch, dtype))
    policy = Policy(model, TEMPERATURE, chunk=64)
    batch, order = pack_to_score(written.sequences, 1, 4096, written.prompt_lengths)
    (micro,) = batch.ranks[0]
    logprobs, _ = policy(to_tensors(micro, device()))
    logprobs.sum().backward()
    missed = [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()
    ]
    if missed:
        raise Broken(f"no gradient, or none that is finite, in {missed[:3]}")
    values = logprobs.detach().float().cpu().numpy()[: micro.n_response_tokens]
    return _gap(order.unpack([[values]]), written)


def zero3(folder: Path, dtype: str, format: str, written: Written) -> float:
    """`learn`'s distance, of a whole learner: DeepSpeed ZeRO-3 on one rank, whose gathered weights are also published."""
    from qarl.algorithm import tbpo
    from qarl.trainer.learner import Learner

    config = LearnerConfig(zero=3, tokens=4096)
    learner = Learner(config, folder, dtype, formats.get(format), tbpo(), TEMPERATURE, total_updates=1, seed=0)
    batch, order = pack_to_score(written.sequences, 1, 4096, written.prompt_lengths)
    scores = learner.score(batch.ranks[0])
    if learner.publish(0, 2) is None:
        raise Broken("rank 0 published nothing")
    return _gap(order.unpack([scores]), written)


def adamw_8bit() -> None:
    """One step of bitsandbytes' 8-bit AdamW."""
    from qarl.trainer.optimizer import make_optimizer

    weight = torch.nn.Parameter(torch.ones(128, 128, device=device()))  # smaller ones keep 32 bits
    optimizer = make_optimizer([("weight", weight)], OptimizerConfig("adamw_8bit", lr=0.1))
    weight.sum().backward()
    optimizer.step()
    if not (weight < 1).all():
        raise Broken("a step left weights as they were")


def rewards() -> tuple[list[float], int]:
    """Values and timeouts of a right, a wrong and an endless response, scored from a thread that is not the main one."""
    from qarl.rewards import Rewarder

    cases = {"\\boxed{\\frac{1}{2}}": "0.5", "\\boxed{4}": "3", "\\boxed{9^{9^{9^{9}}}}": "9^{9^{9^{8}}}"}
    prompts = [Prompt(i, "", np.zeros(2, np.int32), answer) for i, answer in enumerate(cases.values())]
    found: list[Any] = []
    with Rewarder(RewardConfig(workers=1, timeout_s=1.0)) as rewarder:
        thread = threading.Thread(target=lambda: found.append(rewarder.score(list(cases), prompts)))
        thread.start()
        thread.join()
    if not found:
        raise Broken("scoring failed off the main thread")
    return found[0].values.tolist(), found[0].timeouts


def ray() -> float:
    """Seconds that Ray takes to start and to stop."""
    from qarl.cluster import ray_session

    start = time.perf_counter()
    with ray_session(RunConfig()):
        pass
    return time.perf_counter() - start


def surroundings() -> dict[str, Any]:
    """What only torch, the settings of our engine and the import path tell."""
    from qarl.rollout.vllm_settings import ENVIRONMENT

    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        capability = "{}.{}".format(*torch.cuda.get_device_capability(index))
        gpus.append({"capability": capability, "free": free / 2**30, "total": total / 2**30})
    hugging_face = find_spec("kernels")
    return {
        "cuda": torch.version.cuda,
        "gpus": gpus,
        "vnni": torch.cpu._is_vnni_supported(),
        "overridden": {n: os.environ[n] for n, v in ENVIRONMENT.items() if os.environ.get(n, v) != v},
        "foreign": sorted(n for n in os.environ if n.startswith("VLLM_") and n not in ENVIRONMENT),
        "kernels": hugging_face.origin if hugging_face else None,
    }


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _gap(scores: list[np.ndarray], written: Written) -> float:
    return float(np.abs(np.concatenate(scores) - written.logprobs).mean())
