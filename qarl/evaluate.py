"""Evaluate: `python -m qarl.evaluate model=folder model.path=FOLDER data=NAME rollout.format=FORMAT …`

Scores a checkpoint's `policy` folder or a hub model on the held-out set of `data`, sampled by the engine at any format:
mean@n and pass@k with 95 % bootstrap intervals. `--multirun data=A,B rollout.format=bf16,w8a8_int8` makes the table. Each
result is a file of its own, named by data, format and a hash of the settings: only the same evaluation again replaces it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from qarl.build import to_mapping
from qarl.cli import launch
from qarl.config import RunConfig
from qarl.errors import ConfigError

DECIDE = ("model", "data", "rollout", "reward", "evaluation", "seed")
"""Keys and groups of the configuration that the scores depend on."""


def evaluate(config: RunConfig) -> None:
    from qarl.cluster import sampler_only
    from qarl.evaluation import evaluate as score
    from qarl.evaluation import summary
    from qarl.prepare import prepare_evaluation, say
    from qarl.records import Sampling
    from qarl.rewards import Rewarder
    from qarl.rundir import write_atomically

    if config.plan:
        raise ConfigError("plan: true, but only qarl.train prints one: an evaluation has no learner to make room for")
    settings = config.evaluation
    model, prompts, overlong = prepare_evaluation(config)
    if overlong:
        say(f"left out: {overlong} rows with too long a prompt")
    sampling = Sampling(
        temperature=settings.temperature,
        max_tokens=config.rollout.sampling.max_tokens,
        stop=config.rollout.sampling.stop,
    )
    with Rewarder(config.reward) as rewarder, sampler_only(config, model) as sampler:
        found = score(sampler, rewarder, prompts, n=settings.n, sampling=sampling, seed=config.seed)
    rows = summary(found)
    decided = {key: value for key, value in to_mapping(config).items() if key in DECIDE}
    record = {
        "model": config.model.path or config.model.gguf or "pocket",
        "data": config.data.heldout.source,
        "prompts": len(prompts),
        "overlong": overlong,
        "n": settings.n,
        "temperature": settings.temperature,
        "format": config.rollout.format,
        "engine": config.rollout.engine,
        "unscored": found.unscored,
        "seed": config.seed,
        "scores": rows,
        "settings": decided,
    }
    folder = Path(config.out) / config.name
    folder.mkdir(parents=True, exist_ok=True)
    data = Path(config.data.heldout.source).name.replace(":", "_")
    file = folder / f"evaluation_{data}_{config.rollout.format}_{_hash(decided)}.json"
    write_atomically(file, json.dumps(record, indent=1) + "\n")
    print(f"{record['data']} · {len(prompts)} prompts · {config.rollout.format} · temperature {settings.temperature:g}")
    for name, row in rows.items():
        print(f"  {name:<8} {row['mean']:.3f}  [{row['low']:.3f}, {row['high']:.3f}]")
    if found.unscored:
        print(f"  {found.unscored} completions count as wrong since the scorer did not answer in time, ended or raised")
    print(f"  written to {file}")


def _hash(settings: dict[str, Any]) -> str:
    """Eight characters, the same for the same settings."""
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=4).hexdigest()


if __name__ == "__main__":
    launch(evaluate, "evaluate")
