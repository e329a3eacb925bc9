"""Prompts: rows as the engine gets them, and the stream that deals them out for training and resumes anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import jinja2
import numpy as np

from qarl.config import DataConfig, DatasetConfig
from qarl.data import Row, load_rows
from qarl.errors import CheckpointError, ConfigError
from qarl.records import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RowSets:
    """What a run will ask, before there is a tokenizer."""

    train: tuple[Row, ...]
    """None of them held out."""
    heldout: tuple[Row, ...]
    overlap: int
    """Training rows left out because they are held out."""


@dataclass(frozen=True)
class PromptSets:
    """What a run asks."""

    train: tuple[Prompt, ...]
    heldout: tuple[Prompt, ...]
    overlap: int
    """Training rows left out because they are held out."""
    overlong: int
    """Rows of both sets left out because they are longer than `data.max_prompt_tokens`."""


def read(config: DataConfig) -> RowSets:
    """Both data sets. Raises `ConfigError` as `load_rows` does, and where nothing to train on is left."""
    heldout = load_rows(config.heldout, "data.heldout")
    questions, messages = {row.question for row in heldout}, {row.message for row in heldout}
    rows = load_rows(config.train, "data.train")
    fresh = tuple(row for row in rows if row.question not in questions and row.message not in messages)
    if not fresh:
        raise ConfigError(f"data.train: all {len(rows)} rows of {config.train.source!r} also stand in data.heldout")
    return RowSets(fresh, tuple(heldout), overlap=len(rows) - len(fresh))


def to_prompts(rows: RowSets, config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PromptSets:
    """Both sets, tokenized. `Prompt.id` is the position in its set. Raises `ConfigError` as `tokenize` does."""
    train = tokenize(rows.train, config.train, config, tokenizer, "data.train")
    heldout = tokenize(rows.heldout, config.heldout, config, tokenizer, "data.heldout")
    overlong = len(rows.train) - len(train) + len(rows.heldout) - len(heldout)
    return PromptSets(train, heldout, rows.overlap, overlong)


def tokenize(
    rows: Sequence[Row], dataset: DatasetConfig, config: DataConfig, tokenizer: PreTrainedTokenizerBase, key: str
) -> tuple[Prompt, ...]:
    """Rows after the chat template, as tokens; those longer than `config.max_prompt_tokens` are refused or left out.

    `key` is where `dataset` stands (`data.train`). Raises `ConfigError` for a tokenizer without chat template or with one
    that takes no system message, an empty prompt, a prompt that is too long, and where none is short enough.
    """
    texts = [_text(row, dataset, config, tokenizer, key) for row in rows]
    # A chat template writes the special tokens itself.
    encoded = tokenizer(texts, add_special_tokens=not config.chat)["input_ids"]
    prompts: list[Prompt] = []
    for index, (row, text, tokens) in enumerate(zip(rows, texts, encoded, strict=True)):
        start = repr(row.question[:60])
        if not tokens:
            raise ConfigError(f"{key}: row {index} ({start}) is an empty prompt")
        if len(tokens) <= config.max_prompt_tokens:
            prompts.append(Prompt(len(prompts), text, np.array(tokens, np.int32), row.answer, row.extras))
        elif config.overlong == "error":
            raise ConfigError(
                f"data.max_prompt_tokens: {config.max_prompt_tokens}, but row {index} of {key} ({start}) has "
                f"{len(tokens)} tokens; data.overlong=drop leaves such rows out"
            )
    if not prompts:
        raise ConfigError(
            f"data.max_prompt_tokens: {config.max_prompt_tokens}, and all {len(rows)} rows of {key} are longer"
        )
    return tuple(prompts)


def _text(row: Row, dataset: DatasetConfig, config: DataConfig, tokenizer: PreTrainedTokenizerBase, key: str) -> str:
    system = [] if dataset.system is None else [{"role": "system", "content": dataset.system}]
    if not config.chat:
        if system:
            raise ConfigError(f"{key}.system: {dataset.system!r} needs data.chat=true")
        return row.message
    if tokenizer.chat_template is None:
        raise ConfigError("data.chat: true, but the model's tokenizer has no chat template; set data.chat=false")
    messages = [*system, {"role": "user", "content": row.message}]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except jinja2.TemplateError as error:
        where = f"{key}.system: {dataset.system!r}" if system else "data.chat: true"
        raise ConfigError(f"{where} is refused by the tokenizer's chat template: {error}") from error


class PromptStream:
    """The training prompts without end: a new order each pass, cut into batches that may span two passes.

    Everything follows from how many prompts were taken, so a resume at any point continues the very sequence.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool = True):
        if not prompts:
            raise ValueError("a prompt stream needs at least one prompt")
        self._prompts = tuple(prompts)
        self._seed = seed
        self._shuffle = shuffle
        self._taken = 0
        self._pass = -1
        self._order = np.arange(0)

    def __len__(self) -> int:
        """Prompts of one pass."""
        return len(self._prompts)

    def take(self, n: int) -> list[Prompt]:
        """The next n, whose `id` counts from the first prompt of the run on."""
        taken = [replace(self._prompts[self._index(k)], id=k) for k in range(self._taken, self._taken + n)]
        self._taken += n
        return taken

    def state(self) -> dict[str, int | bool | str]:
        """For a checkpoint: plain JSON."""
        return {"taken": self._taken} | self._identity

    def restore(self, state: Mapping[str, object]) -> None:
        """Continue after the prompts that were taken when `state` was made.

        Raises `CheckpointError`, and changes nothing, where the prompts or their order are not those of `state`.
        """
        for name, mine in self._identity.items():
            if state.get(name) != mine:
                raise CheckpointError(
                    f"the checkpoint's prompt stream has {name} {state.get(name)!r}, this run's {mine!r}: "
                    "prompts (data, template, tokenizer), seed and shuffle must be those of the run it continues"
                )
        taken = state.get("taken")
        if not isinstance(taken, int) or taken < 0:
            raise CheckpointError(f"the checkpoint's prompt stream has no valid position: {taken!r}")
        self._taken = taken

    @cached_property
    def _identity(self) -> dict[str, int | bool | str]:
        return {
            "size": len(self),
            "seed": self._seed,
            "shuffle": self._shuffle,
            "fingerprint": _fingerprint(self._prompts),
        }

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self))
        if epoch != self._pass:
            self._pass, self._order = epoch, self._permutation(epoch)
        return int(self._order[place])

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self._shuffle:
            return np.arange(len(self))
        # NumPy promises the raw stream of a bit generator for ever, but not what `Generator.permutation` makes of it: a
        # checkpoint must survive an upgrade.
        key = np.array([self._seed % 2**64, epoch], dtype=np.uint64)
        return np.argsort(np.random.Philox(key=key).random_raw(len(self)), kind="stable")


def _fingerprint(prompts: Iterable[Prompt]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        for part in (prompt.tokens.astype("<i4").tobytes(), prompt.answer.encode("utf-8", "surrogatepass")):
            digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
