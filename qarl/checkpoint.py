"""Checkpoints that are whole or not there: written aside, hashed, renamed. Safetensors and JSON only; nothing is ever unpickled.

runs/NAME/checkpoints/step-000010/
    policy/            the policy in Hugging Face layout: transformers and vLLM load it
    learner/           masters and moments of the optimizer (safetensors), its counters and RNG (JSON)
    state.json         step, prompt position, format and contract hash
    manifest.json      size and SHA-256 of every other file; written last
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qarl.errors import CheckpointError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    state: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Steps that were done when it was made: the next one to run."""
        return int(self.state["step"])


def save(root: Path, state: Mapping[str, Any], write: Callable[[Path], None], keep: int | None = None) -> Path:
    """Make `root/step-N` for N = `state["step"]`, with what `write` puts into the folder it is given.

    Then all but the newest `keep`, where that is given, are dropped, and folders of later steps: they were passed over as
    damaged, and this run does those steps again; and drafts that a killed run left. What cannot be dropped, as someone reads it,
    is left to a later call.

    A reader sees all of it or nothing. Raises `CheckpointError` where the disk refuses (full, read-only); the draft is removed
    and older checkpoints stay.
    """
    final = root / f"step-{int(state['step']):06d}"
    draft = root / f".{final.name}.draft"
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        write(draft)
        if not _files(draft):
            raise OSError(
                "nothing of it is to be seen here; out= must lie on a disk that this node shares with the learner"
            )
        _write_json(draft / "state.json", state)
        _write_json(draft / MANIFEST, {str(f.relative_to(draft)): _entry(f) for f in _files(draft)})
        shutil.rmtree(final, ignore_errors=True)
        os.rename(draft, final)
        _sync_folder(root)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {final} could not be written: {error}. Earlier checkpoints are untouched; free some space, then "
            "continue with resume=auto"
        ) from error
    if keep is None:
        return final
    superseded = [folder for folder in _folders(root) if folder.name > final.name]
    for old in [*superseded, *_folders(root)[len(superseded) + keep :], *root.glob(".step-*.draft")]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest(root: Path) -> Checkpoint | None:
    """The newest complete checkpoint under `root`; `None` where there is none. Damaged ones are named and passed over."""
    for folder in _folders(root):
        damage = find_damage(folder)
        if damage is None:
            return Checkpoint(folder, json.loads((folder / "state.json").read_text()))
        print(f"checkpoint {folder} is damaged ({damage}): trying the one before it", file=sys.stderr)
    return None


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, or `None`."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {error}"
    entries = manifest.values() if isinstance(manifest, dict) else [None]
    if not all(isinstance(entry, dict) and entry.keys() == {"bytes", "sha256"} for entry in entries):
        return f"{MANIFEST} does not list files with their size and SHA-256"
    for name, expected in manifest.items():
        file = folder / name
        try:
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {expected['bytes']}"
            if _sha256(file) != expected["sha256"]:
                return f"{name} has other contents than were written"
        except OSError as error:
            return f"{name}: {error}"
    return None


def exist(root: Path) -> bool:
    """Whether there are checkpoints under `root`, damaged ones too."""
    return bool(_folders(root))


def _folders(root: Path) -> list[Path]:
    """Newest first."""
    return sorted(root.glob("step-*"), reverse=True)


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.is_file())


def _entry(file: Path) -> dict[str, Any]:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
    return {"bytes": file.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
    with file.open("w") as handle:
        json.dump(data, handle, indent=1)
        handle.flush()
        os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
