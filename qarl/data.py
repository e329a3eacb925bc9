"""Data sets: rows of questions and answers from reasoning-gym, files and the hub. No tokenizer, no torch."""

from __future__ import annotations

import dataclasses
import difflib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from qarl.config import DatasetConfig
from qarl.errors import ConfigError

PROCEDURAL = "reasoning_gym:"
HUB_OPTIONS = ("name", "revision", "data_dir", "data_files")


@dataclass(frozen=True)
class Row:
    """One question with its reference answer."""

    question: str
    """The prompt field as it stands in the data set."""
    message: str
    """What the user says: `template` filled in."""
    answer: str
    extras: Mapping[str, object]
    """The fields that `fields.extras` names. Rows of reasoning-gym always carry what their task's scorer needs: `task`,
    `options`, `question`, `metadata`."""


def load_rows(config: DatasetConfig, key: str) -> list[Row]:
    """The rows of one data set, in its own order.

    `key` is where `config` stands (`data.train`), for messages. Raises `ConfigError` naming the key, the value and the
    choices: unknown source, task, option, split or field; a missing, malformed or empty file; a row without question or
    answer.
    """
    if not config.source:
        raise ConfigError(f"{key}.source: must be given: {PROCEDURAL}TASK, a .jsonl or .parquet file, or a hub name")
    if config.size is not None and config.size <= 0:
        raise ConfigError(f"{key}.size: must be positive or null, got {config.size}")
    if config.source.startswith(PROCEDURAL):
        found: Iterable[dict] = _procedural(config, key)
    elif config.source.endswith((".jsonl", ".parquet")):
        found = _from_file(config, key)
    elif Path(config.source).is_file():
        raise ConfigError(f"{key}.source: {config.source!r} is a file, but neither .jsonl nor .parquet")
    else:
        found = _from_hub(config, key)
    rows = [_row(fields, index, config, key) for index, fields in enumerate(islice(found, config.size))]
    if not rows:
        raise ConfigError(f"{key}.source: {config.source!r} is empty")
    if config.size is not None and len(rows) < config.size:
        raise ConfigError(f"{key}.size: {config.size} rows asked for, {config.source!r} has {len(rows)}")
    return rows


def nearest(name: str, choices: Iterable[str]) -> str:
    """`; did you mean 'x'? choices: …`, the end of a message about an unknown name."""
    choices = sorted(choices)
    close = difflib.get_close_matches(name, choices, n=1)
    return (f"; did you mean {close[0]!r}?" if close else ";") + f" choices: {', '.join(choices)}"


def _procedural(config: DatasetConfig, key: str) -> Iterator[dict]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of a library it imports
        from reasoning_gym.factory import DATASETS, create_dataset  # seconds of imports, only for runs that use it

    task = config.source.removeprefix(PROCEDURAL)
    if task not in DATASETS:
        raise ConfigError(f"{key}.source: unknown reasoning-gym task {task!r}{nearest(task, DATASETS)}")
    if config.size is None:
        raise ConfigError(f"{key}.size: must be given, {config.source} has no end")
    if config.split != "train":
        raise ConfigError(f"{key}.split: {config.split!r}, but a task has no splits")
    known = {field.name for field in dataclasses.fields(DATASETS[task][1])} - {"size", "seed"}
    for name in config.options:
        if name not in known:
            raise ConfigError(f"{key}.options.{name}: {task} has no such option{nearest(name, known)}")
    try:
        dataset = create_dataset(task, size=config.size, seed=config.seed, **config.options)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"{key}.options: {dict(config.options)} is refused by {task}: {error}") from error
    options = dict(config.options)
    for index in range(config.size):
        yield dataset[index] | {"task": task, "options": options}


def _from_file(config: DatasetConfig, key: str) -> Iterable[dict]:
    path = Path(config.source).expanduser()
    if not path.is_file():
        raise ConfigError(f"{key}.source: no such file {config.source!r}")
    if config.options:
        raise ConfigError(f"{key}.options: {dict(config.options)} mean nothing to a file")
    if config.split != "train":
        raise ConfigError(f"{key}.split: {config.split!r}, but a file has no splits")
    return _jsonl(path, key) if path.suffix == ".jsonl" else _load_dataset("parquet", config, key, data_files=str(path))


def _jsonl(path: Path, key: str) -> Iterator[dict]:
    # Not through `datasets`, whose JSON reader cannot say in which line a file is broken.
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except ValueError as error:  # UnicodeDecodeError is one too
                raise ConfigError(f"{key}.source: {path}:{number}: not JSON: {error}") from error
            if not isinstance(fields, dict):
                raise ConfigError(f"{key}.source: {path}:{number}: expected an object, got {type(fields).__name__}")
            yield fields


def _from_hub(config: DatasetConfig, key: str) -> Iterable[dict]:
    for name in config.options:
        if name not in HUB_OPTIONS:
            raise ConfigError(f"{key}.options.{name}: hub data sets have no such option{nearest(name, HUB_OPTIONS)}")
    return _load_dataset(config.source, config, key, **config.options)


def _load_dataset(path: str, config: DatasetConfig, key: str, **options) -> Iterable[dict]:
    import datasets  # seconds of imports, only for runs that use it

    try:
        return datasets.load_dataset(path, split=config.split, **options)
    except Exception as error:  # it raises whatever its readers and the network raise
        of_split = "split" in str(error).replace(config.source, "")
        where = f"{key}.split: {config.split!r}" if of_split else f"{key}.source: {config.source!r}"
        raise ConfigError(f"{where} of {config.source!r} cannot be loaded: {type(error).__name__}: {error}") from error


def _row(fields: Mapping, index: int, config: DatasetConfig, key: str) -> Row:
    names = config.fields
    wanted = {"prompt": names.prompt, "answer": names.answer} | {
        f"extras[{i}]": name for i, name in enumerate(names.extras)
    }
    found = {}
    for meaning, name in wanted.items():
        try:
            found[meaning] = _at(fields, name)
        except (LookupError, ValueError, TypeError):
            raise ConfigError(
                f"{key}.fields.{meaning}: row {index} of {config.source!r} has no field {name!r}{nearest(name, fields)}"
            ) from None
    question, answer = found["prompt"], found["answer"]
    if not isinstance(question, str):
        raise ConfigError(
            f"{key}.fields.prompt: {names.prompt!r} of row {index} of {config.source!r} must be text, "
            f"got {type(question).__name__}"
        )
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ConfigError(
            f"{key}.fields.answer: {names.answer!r} of row {index} of {config.source!r} must be text or a number, "
            f"got {type(answer).__name__}"
        )
    carried = ("task", "options", "question", "metadata") if config.source.startswith(PROCEDURAL) else ()
    extras = {name: fields[name] for name in carried} | {n: found[f"extras[{i}]"] for i, n in enumerate(names.extras)}
    return Row(question, _message(fields, question, index, config, key), _text(answer), extras)


def _text(answer: str | int | float) -> str:
    """A float in digits: LaTeX reads 1e-05 as 1·e − 5."""
    return np.format_float_positional(answer, trim="0") if isinstance(answer, float) else str(answer)


def _at(fields: Mapping, path: str) -> Any:
    """The field of that name, or what lies at the end of that path of names and places. Raises `LookupError`, `ValueError` or
    `TypeError` where there is none."""
    if path in fields:
        return fields[path]
    value: Any = fields
    for step in path.split("."):
        value = value[int(step)] if isinstance(value, list | tuple) else value[step]
    return value


def _message(fields: Mapping, question: str, index: int, config: DatasetConfig, key: str) -> str:
    known = {**fields, "prompt": question}
    try:
        return config.template.format(**known)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{key}.template: {config.template!r} cannot be filled from row {index}: {type(error).__name__}: {error}; "
            f"fields: {', '.join(sorted(known))}; a literal brace is written twice"
        ) from error
