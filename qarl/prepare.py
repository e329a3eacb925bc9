"""Before anything expensive starts: the data is read, the policy's folder is made or found, prompts are tokenized."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import transformers
from transformers import AutoTokenizer

from qarl.config import RunConfig
from qarl.data import load_rows
from qarl.prompts import PromptStream, load_prompts
from qarl.records import Prompt
from qarl.trainer.model import materialize


@dataclass(frozen=True)
class Inputs:
    """What a run starts from."""

    model: str
    """Folder in Hugging Face layout, or a hub name."""
    train: PromptStream
    heldout: tuple[Prompt, ...]
    """Those that are evaluated."""
    canaries: tuple[Prompt, ...]


def prepare(config: RunConfig) -> Inputs:
    """Raises `ConfigError` for whatever is wrong with data or model."""
    transformers.utils.logging.disable_progress_bar()  # of files; ours shows steps
    if not config.placement.gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no other
    heldout = [row.message for row in load_rows(config.data.heldout, "data.heldout")] if config.model.pocket else []
    model = materialize(config.model, cache_folder(), held_out=heldout, progress=warm_start_progress())
    sets = load_prompts(config.data, AutoTokenizer.from_pretrained(model, revision=config.model.revision))
    if sets.overlap or sets.overlong:
        say(f"left out: {sets.overlap} training rows that are held out, {sets.overlong} rows with too long a prompt")
    evaluated = sets.heldout[: config.evaluation.prompts]
    return Inputs(
        model=str(model),
        train=PromptStream(sets.train, config.seed, config.data.shuffle),
        heldout=evaluated,
        canaries=sets.heldout[: config.sync.canaries],
    )


def cache_folder() -> Path:
    """Where made and converted models are kept: `$QARL_CACHE`, else `~/.cache/qarl`."""
    return Path(os.environ.get("QARL_CACHE") or Path.home() / ".cache" / "qarl")


def warm_start_progress(every: int = 100) -> Callable[[int, int, float], None]:
    """Says every so often how far the supervised warm start of a pocket model is."""

    def progress(step: int, steps: int, loss: float) -> None:
        if step % every == 0 or step == steps:
            say(f"warm start {step}/{steps}: loss {loss:.3f}")

    return progress


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
