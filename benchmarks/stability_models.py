"""What the arms of `benchmarks.stability` start from: files of sums, and models warm-started until they are right often enough.

    12 + 34 - 56 =      12+34=46 ⏎ 46-56=-10 ⏎ -10

One digit more or less in one of two dozen lines makes the answer wrong, so errors accumulate over a few hundred tokens.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.stability_arms import MODELS
from qarl import formats
from qarl.batching import pack_to_score
from qarl.config import ModelConfig, PocketConfig
from qarl.errors import ConfigError
from qarl.prepare import cache_folder, say
from qarl.trainer import pocket
from qarl.trainer.aligned import AlignedModel
from qarl.trainer.model import load_model, materialize
from qarl.trainer.policy import Policy, to_tensors

SIZES = {"warm": 60_000, "train": 8_000, "heldout": 256, "check": 256}
"""File -> rows. No question stands in two of them; `check` decides when the warm start ends."""
FORMATS = ("bf16", "w4a16", "w8a8_int8", "w8a8_fp8")
MICRO_BATCH_TOKENS = 16384


def write_data(folder: Path, terms: int, digits: int, sizes: dict[str, int]) -> None:
    """`FILE.jsonl` for each of `sizes`: rows of reasoning-gym's chain_sum, `{"question": "12 + 34 =", "answer": "46"}`."""
    import reasoning_gym  # seconds of imports

    shape = {"min_terms": terms, "max_terms": terms, "min_digits": digits, "max_digits": digits}
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for place, (name, size) in enumerate(sizes.items()):
        # Item i is drawn with seed + i: sets lie further apart than any is long.
        items = reasoning_gym.create_dataset("chain_sum", seed=(place + 1) * 10_000_000, size=2 * size, **shape)
        with (folder / f"{name}.jsonl").open("w") as file:
            for item in islice((item for item in items if item["metadata"]["expression"] not in seen), size):
                seen.add(item["metadata"]["expression"])
                row = {"question": f"{item['metadata']['expression']} =", "answer": item["answer"]}
                file.write(json.dumps(row) + "\n")
                size -= 1
        if size:
            raise ConfigError(
                f"--terms, --digits: {terms} and {digits} make too few sums, {name}.jsonl lacks {size}; raise one"
            )


def worked(question: str) -> str:
    """Every running total as a line of its own, then the last one: what `reward.kind=exact` looks at."""
    first, *rest = question.removesuffix(" =").split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total}{sign}{term}={result}\n")
        total = result
    return "".join(lines) + str(total)


def warm(
    name: str, work: Path, *, target: float, every: int, steps: int | None, limit_s: float, gguf: str
) -> dict[str, Any]:
    """Train model `name` on `warm.jsonl` until its chance on `check.jsonl` reaches `target`, and save it as BF16 under `models`.

    Looks every `every` steps, and at the last one. What it has after `limit_s` seconds, or after `steps` (those of its spec where
    `None`; learning rates come down towards them), is saved too, and said not to have reached the target.
    """
    spec = MODELS[name] if steps is None else replace(MODELS[name], steps=steps)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")  # on a GPU in TF32
    model, tokenizer = _beginning(name, spec, gguf)
    model.to(device)
    check, lessons = _pairs(work / "data" / "check.jsonl"), cycle(_pairs(work / "data" / "warm.jsonl"))
    started, found = time.perf_counter(), 0.0
    for step, loss in enumerate(pocket.warm_start(model, tokenizer, spec, lessons), start=1):
        seconds = time.perf_counter() - started
        last = seconds > limit_s or step == spec.steps
        if step % every == 0 or last:
            found = chance(model, tokenizer, check)
            say(f"{name}: step {step}, loss {loss:.4f}, chance {found:.3f}, {seconds:.0f} s")
        if found >= target or last:
            break
    if found < target:
        say(f"{name}: NOT warm enough, chance {found:.3f} after {step} steps, wanted {target}")
    folder = work / "models" / name
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = sum(p.numel() for p in model.parameters())
    return {
        "model": name,
        "weights": weights,
        "steps": step,
        "loss": loss,
        "seconds": seconds,
        "reached": found >= target,
    }


def chances(folder: Path, data: Path, names: Sequence[str] = FORMATS) -> dict[str, float]:
    """Format -> chance of the saved model on the held-out questions, as the learner computes them aligned to that format, at `bf16`
    by transformers' own ops.

    On a CPU in float32. A format that this machine or model cannot do is left out, and said.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer, pairs = AutoTokenizer.from_pretrained(folder), _pairs(data / "heldout.jsonl")
    found = {}
    for name in names:
        model: Any = load_model(folder, dtype)
        model.to(device).eval()
        try:
            AlignedModel(model, formats.get(name), "auto" if name != "bf16" else "none", device.type, dtype)
        except ConfigError as error:
            say(f"{folder.name} at {name}: {error}")
            continue
        found[name] = packed_chance(model, tokenizer, pairs, device)
    return found


@torch.no_grad()
def packed_chance(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], device: torch.device) -> float:
    """`chance` by the learner's packed forward, which aligned models have alone."""
    rows = pocket.tokenized(tokenizer, pairs)
    sequences, prompts = [np.array(p + a, np.int32) for p, a in rows], [len(p) for p, _ in rows]
    batch, order = pack_to_score(sequences, 1, MICRO_BATCH_TOKENS, prompts)
    policy = Policy(model, 1.0, 1024)
    values = [
        policy(to_tensors(micro, device))[0].float().cpu().numpy()[: micro.n_response_tokens]
        for micro in batch.ranks[0]
    ]
    return float(np.mean([math.exp(logprobs.sum()) for logprobs in order.unpack([values])]))


@torch.no_grad()
def chance(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], batch: int = 64) -> float:
    """Mean probability that sampling at temperature 1 writes exactly the worked answer: as often it is right, or more often where
    there are other ways to be. Costs one forward and no sampling."""
    found = []
    for start in range(0, len(pairs), batch):
        tokens, labels = (t.to(model.device) for t in pocket.padded(tokenizer, pairs[start : start + batch]))
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels[:, 1:], ignore_index=pocket.IGNORED, reduction="none"
        )
        found += (-losses.sum(1)).exp().tolist()
    return float(np.mean(found))


def _beginning(name: str, spec: PocketConfig, gguf: str) -> tuple[Any, Any]:
    if name == "smollm2":
        folder = materialize(ModelConfig(gguf=gguf), cache_folder())
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)
    tokenizer = pocket.build_tokenizer(spec.context)
    return pocket.build_model(spec, tokenizer), tokenizer


def _pairs(file: Path) -> list[tuple[str, str]]:
    """(question, worked answer) of each row."""
    if not file.is_file():
        raise ConfigError(f"no {file}: python -m benchmarks.stability data writes it")
    with file.open() as lines:
        questions = [json.loads(line)["question"] for line in lines]
    return [(question, worked(question)) for question in questions]
