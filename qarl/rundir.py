"""The folder of a run: what is in it, and what happens to one that is there already.

runs/NAME/config.yaml  metrics.jsonl  samples.jsonl  summary.json  report.html  checkpoints/  wandb/
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qarl import checkpoint
from qarl.build import build, to_mapping
from qarl.checkpoint import Checkpoint
from qarl.config import RunConfig
from qarl.errors import CheckpointError, ConfigError
from qarl.jsonl import naming

#: Keys that may differ between a run and its continuation: they do not change what a step computes. So may `steps`, unless the
#: learning rate decays towards the last one.
FREE = (
    "resume",
    "plan",
    "out",
    "name",
    "logging",
    "checkpoint",
    "guard.warn",
    "guard.stop",
    "guard.patience",
    "sync",
    "placement.address",
    "rollout.restarts",
    "rollout.gpu_memory",
    "rollout.kv_cache_gb",
    "reward.workers",
    "evaluation.every",
)


@dataclass(frozen=True)
class RunDir:
    """A run's folder, opened."""

    path: Path
    resumed: Checkpoint | None
    """Where to continue from; `None` starts at step 0."""

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def first_step(self) -> int:
        return self.resumed.step if self.resumed else 0


def check_resume(config: RunConfig) -> None:
    """Raise `ConfigError`, with the keys that differ, where `resume=auto` finds a run of another configuration. Changes nothing."""
    path = Path(config.out) / config.name
    if config.resume == "auto" and (path / "config.yaml").exists():
        _check_same(load_config(path), config)


@contextmanager
def owned(config: RunConfig) -> Iterator[None]:
    """While a run lasts: two processes in one folder would drop each other's checkpoints and move each other's files aside.

    Raises `ConfigError` where a process that lives has it. The lock lies beside the folder, which may be renamed, and goes with
    its process, however that ends.
    """
    path = Path(config.out) / config.name
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".{path.name}.lock")
    with naming(file):
        lock = file.open("w")
    with lock:
        try:
            with naming(file):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"name: {path} is being run by another process; choose another name=, or end that one"
            ) from None
        yield


def open_run(config: RunConfig) -> RunDir:
    """Make the folder, or find what to continue from.

    `resume=never` moves an old run of that name aside, so nothing is lost. `resume=auto` raises `ConfigError` as
    `check_resume` does, and where the run is already further than `steps`, and `CheckpointError` where there are checkpoints, but
    none is whole.
    """
    check_resume(config)
    path = Path(config.out) / config.name
    resumed = None
    if config.resume == "never":
        _move_aside(path)
    elif (path / "config.yaml").exists():
        resumed = checkpoint.newest(path / "checkpoints")
        if resumed is None and checkpoint.exist(path / "checkpoints"):
            raise CheckpointError(
                f"{path / 'checkpoints'}: resume=auto, but no checkpoint there is whole; starting at step 0 would drop them all. "
                "Move them away to start over, or see to the disk they lie on"
            )
        if resumed and config.steps < resumed.step:
            raise ConfigError(f"steps: {config.steps}, but {resumed.folder} is already at step {resumed.step}")
    path.mkdir(parents=True, exist_ok=True)
    write_atomically(path / "config.yaml", yaml.safe_dump(to_mapping(config), sort_keys=False))
    return RunDir(path, resumed)


def load_config(path: Path) -> RunConfig:
    """The configuration a run was started with. `ConfigError` names the file where another version of QaRL wrote it."""
    file = path / "config.yaml"
    try:
        return build(RunConfig, yaml.safe_load(file.read_text()))
    except ConfigError as error:
        raise ConfigError(
            f"{file}: {error}. Another version of QaRL wrote it; choose another name= to start anew"
        ) from error


def write_atomically(file: Path, text: str) -> None:
    """Readers see the old text or the new one."""
    draft = file.with_name(f".{file.name}.draft")
    with naming(file):
        draft.write_text(text)
        os.replace(draft, file)


def _move_aside(path: Path) -> None:
    if not path.exists():
        return
    number = 1
    while (old := path.with_name(f"{path.name}.old{number}")).exists():
        number += 1
    path.rename(old)
    print(f"{path} held a run: it is {old} now (resume=auto would have continued it)")


def _check_same(old: RunConfig, new: RunConfig) -> None:
    free = (*FREE, "steps") if new.learner.optimizer.schedule == "constant" else FREE
    before, after = dict(leaves(to_mapping(old))), dict(leaves(to_mapping(new)))
    changed = [
        f"{key}: was {before.get(key)!r}, now {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not under(key, free)
    ]
    if changed:
        raise ConfigError(
            f"resume: {Path(new.out) / new.name} was run with another configuration; choose another name= "
            "(with model=folder model.path=…/policy it goes on from a checkpoint's policy), or resume=never to start over:\n  "
            + "\n  ".join(changed)
        )


def under(key: str, tops: tuple[str, ...]) -> bool:
    """`under("logging.project", ("logging",))`"""
    return any(key == top or key.startswith(top + ".") for top in tops)


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from leaves(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value
