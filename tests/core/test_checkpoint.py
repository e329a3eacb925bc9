"""Checkpoints are whole or not there."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from qarl import checkpoint
from qarl.errors import CheckpointError


def write(folder: Path) -> None:
    (folder / "policy").mkdir()
    (folder / "policy" / "model.safetensors").write_bytes(os.urandom(5000))


def save(root: Path, step: int, keep: int = 3) -> Path:
    return checkpoint.save(root, {"step": step, "prompts": {"position": step * 8}}, write, keep)


def test_the_newest_comes_back_with_its_state(tmp_path):
    save(tmp_path, 5), save(tmp_path, 10)
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 10 and found.state["prompts"] == {"position": 80}


def test_nothing_there_is_none(tmp_path):
    assert checkpoint.newest(tmp_path) is None and checkpoint.newest(tmp_path / "missing") is None


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-000003", "step-000004"]


def test_damaged_later_ones_that_a_resume_passed_over_do_not_crowd_out_the_new_one(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, step)
    for later in ("step-000010", "step-000015"):
        truncate(tmp_path / later)
    new = save(tmp_path, 7, keep=2)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-000005", "step-000007"]
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.folder == new


def test_where_none_is_to_be_dropped_later_ones_stay_too(tmp_path):
    """As the states of a run that diverged, was resumed and diverged again earlier: each is evidence."""
    checkpoint.save(tmp_path, {"step": 50}, write), checkpoint.save(tmp_path, {"step": 45}, write)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-000045", "step-000050"]


def test_an_old_one_that_cannot_be_removed_does_not_end_the_run(tmp_path, monkeypatch):
    """As on NFS, while someone reads it: it is half gone, which a resume passes over, and a later call tries again."""
    for step in (1, 2):
        save(tmp_path, step, keep=2)

    def busy(*_: object, **__: object) -> None:
        raise OSError(errno.EBUSY, "busy")

    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", busy)
        new = save(tmp_path, 3, keep=2)
    assert (tmp_path / "step-000001").exists() and checkpoint.find_damage(tmp_path / "step-000001")
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.folder == new
    save(tmp_path, 4, keep=2)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-000003", "step-000004"]


def truncate(folder: Path) -> None:
    os.truncate(folder / "policy" / "model.safetensors", 100)


def flip(folder: Path) -> None:
    file = folder / "policy" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[77] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip,
        lambda folder: (folder / "policy" / "model.safetensors").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: os.truncate(folder / "manifest.json", 10),
        lambda folder: os.truncate(folder / "state.json", 3),
        lambda folder: (folder / "manifest.json").write_text("[1]"),
        lambda folder: (folder / "manifest.json").write_text('{"state.json": 3}'),
    ],
    ids=[
        "truncated",
        "flipped bit",
        "missing file",
        "no manifest",
        "torn manifest",
        "torn state",
        "a list",
        "no sizes",
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_found(tmp_path, capsys, damage):
    save(tmp_path, 5)
    damage(save(tmp_path, 10))
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 5
    assert "step-000010 is damaged" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_read_is_passed_over_too(tmp_path, capsys, monkeypatch):
    save(tmp_path, 5)
    save(tmp_path, 10)
    sha256 = checkpoint._sha256

    def read(file):
        if "step-000010" in str(file):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return sha256(file)

    monkeypatch.setattr(checkpoint, "_sha256", read)
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 5
    assert "Input/output error" in capsys.readouterr().err


def test_drafts_of_killed_saves_go_whatever_step_they_were_of(tmp_path):
    """`checkpoint.every` may be another one after a resume."""
    (tmp_path / ".step-000010.draft" / "policy").mkdir(parents=True)
    save(tmp_path, 12, keep=1)
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-000012"]


def test_a_killed_save_leaves_no_checkpoint_and_is_cleaned_up_by_the_next(tmp_path):
    save(tmp_path, 5)
    draft = tmp_path / ".step-000010.draft"
    code = f"""
import os, pathlib
from qarl import checkpoint
def write(folder):
    (folder / "half").write_bytes(b"x" * 100)
    os.kill(os.getpid(), 9)
checkpoint.save(pathlib.Path({str(tmp_path)!r}), {{"step": 10}}, write, 2)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    assert draft.is_dir()
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 5
    save(tmp_path, 10)
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 10 and not draft.exists()


def test_a_disk_that_refuses_leaves_the_previous_checkpoint_and_says_what_to_do(tmp_path):
    """A file size limit stands for the full disk: `write` fails in the middle of the file, as it does with ENOSPC."""
    save(tmp_path, 5)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write_much(folder: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        try:
            write(folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with pytest.raises(CheckpointError, match="step-000010 could not be written: .*resume=auto"):
        checkpoint.save(tmp_path, {"step": 10}, write_much, 1)
    assert [f.name for f in tmp_path.iterdir()] == ["step-000005"]
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 5


def test_a_checkpoint_that_was_written_elsewhere_is_none(tmp_path):
    """As by a learner on a node without this disk: the older ones must not make room for it."""

    def write(folder: Path) -> None:
        (folder / "policy").write_text("weights")

    first = checkpoint.save(tmp_path, {"step": 1}, write, keep=1)
    with pytest.raises(CheckpointError, match="nothing of it is to be seen here; out= must lie on a disk"):
        checkpoint.save(tmp_path, {"step": 2}, lambda folder: None, keep=1)
    assert [path for path in tmp_path.iterdir()] == [first]


def test_the_manifest_lists_every_file(tmp_path):
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest) == {"state.json", "policy/model.safetensors"}
