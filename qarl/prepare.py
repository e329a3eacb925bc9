"""Before anything expensive starts: the data is read, the policy's folder is made or found, prompts are tokenized."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from qarl import formats
from qarl.config import RunConfig
from qarl.data import Row, load_rows
from qarl.errors import ConfigError
from qarl.prompts import PromptStream, read, to_prompts, tokenize
from qarl.records import Prompt
from qarl.shapes import check_ranks, parameter_shapes
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
    if not config.placement.gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no other
    rows = read(config.data)
    model, tokenizer = prepare_policy(config, rows.heldout)
    sets = to_prompts(rows, config.data, tokenizer)
    if sets.overlap or sets.overlong:
        say(f"left out: {sets.overlap} training rows that are held out, {sets.overlong} rows with too long a prompt")
    canaries = sets.heldout[: config.sync.canaries]
    if canaries and all(len(prompt.tokens) < 2 for prompt in canaries):
        raise ConfigError(
            f"data.heldout: none of the first {len(canaries)} prompts has two tokens, so sync.canaries={config.sync.canaries} "
            "proves nothing; give longer prompts or sync.canaries=0"
        )
    return Inputs(
        model=model,
        train=PromptStream(sets.train, config.seed, config.data.shuffle),
        heldout=sets.heldout[: config.evaluation.prompts],
        canaries=canaries,
    )


def prepare_evaluation(config: RunConfig) -> tuple[str, tuple[Prompt, ...], int]:
    """The policy, the held-out prompts that are asked, and how many rows were left out as too long; `data.train` is not read.
    Raises `ConfigError` as `prepare` does."""
    rows = load_rows(config.data.heldout, "data.heldout")
    model, tokenizer = prepare_policy(config, rows)
    prompts = tokenize(rows, config.data.heldout, config.data, tokenizer, "data.heldout")
    return model, prompts[: config.evaluation.prompts], len(rows) - len(prompts)


def prepare_policy(config: RunConfig, heldout: Sequence[Row]) -> tuple[str, PreTrainedTokenizerBase]:
    """Folder or hub name of the policy, and its tokenizer."""
    check_gpus(config)
    transformers.utils.logging.disable_progress_bar()  # of files; ours shows steps
    messages = [row.message for row in heldout]
    model = materialize(config.model, cache_folder(), held_out=messages, progress=warm_start_progress())
    check_fit(config, AutoConfig.from_pretrained(model, revision=config.model.revision).to_dict())
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=config.model.revision)
    except Exception as error:  # it raises whatever its formats' parsers raise
        raise ConfigError(f"model.path: {str(model)!r} has no tokenizer that loads: {error}") from error
    check_stop(config.rollout.sampling.stop, tokenizer)
    return str(model), tokenizer


def check_gpus(config: RunConfig) -> None:
    """Raise `ConfigError` where this machine has not the GPUs that the run asks for. A running Ray cluster is asked later."""
    wanted, here = config.placement.gpus, torch.cuda.device_count()
    if wanted > here and config.placement.address is None:
        raise ConfigError(f"placement.gpus: {wanted}, but torch sees {here} here")
    if here and not wanted and config.rollout.engine == "vllm":
        raise ConfigError(
            f"placement.gpus: 0 runs on CPU, but torch sees {here} here and vLLM is built for them; choices: placement=gpu with "
            "model.dtype=bfloat16 (as recipe=quickstart_gpu), or rollout.engine=torch"
        )


def check_stop(stop: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ConfigError` for a stop string that no response can hold: special tokens are no part of its text."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for i, string in enumerate(stop):
        if found := [token for token in special if token in string]:
            raise ConfigError(
                f"rollout.sampling.stop[{i}]: {string!r} holds the special token {found[0]!r}, which is no part of a response's "
                "text; those that end a response are the tokenizer's and generation_config.json's eos_token_id"
            )


def check_fit(config: RunConfig, architecture: Mapping[str, Any]) -> None:
    """Raise `ConfigError` where the model's `config.json` does not suit the format or the context."""
    format = formats.get(config.rollout.format)
    for name, shape in parameter_shapes(architecture).items():
        format.check_shape(name, shape)
    if config.rollout.tensor_parallel > 1:
        check_ranks(architecture, format, config.rollout.tensor_parallel)
    positions = architecture.get("max_position_embeddings")
    if positions is not None and positions < config.model.max_tokens:
        raise ConfigError(
            f"model.max_tokens: {config.model.max_tokens}, but the model has {positions} positions (max_position_embeddings)"
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
