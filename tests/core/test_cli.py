"""A disk that refuses while a run writes."""

import resource
import subprocess
import sys

import pytest

from qarl.rundir import write_atomically

REFUSED = """
import errno, os, pathlib, resource, sys
from qarl import cli, jsonl
def work(config):
    log = jsonl.StepLog(pathlib.Path(sys.argv[1].removeprefix("out=")) / "metrics.jsonl")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    try:
        log.append(0, {"x": "y" * 1000})
    finally:
        log.close()
cli.launch(work, "train")
"""


def test_a_full_disk_ends_a_run_with_the_file_and_what_to_do(tmp_path):
    """A file size limit stands for the full disk: writing fails in the middle of the file, as it does with ENOSPC."""
    command = [sys.executable, "-c", REFUSED, f"out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (said,) = done.stderr.splitlines()
    assert str(tmp_path / "metrics.jsonl") in said and "File too large" in said and said.endswith("resume=auto")


def test_an_atomic_write_that_is_refused_names_the_file(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = tmp_path / "summary.json"
    file.write_text("old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="summary.json"):
            write_atomically(file, "x" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert file.read_text() == "old"


def test_another_mistake_of_the_system_is_not_taken_for_a_full_disk(tmp_path):
    code = REFUSED.replace("    log = ", '    raise FileNotFoundError(errno.ENOENT, "gone", "x")\n    log = ')
    done = subprocess.run([sys.executable, "-c", code, f"out={tmp_path}"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "FileNotFoundError" in done.stderr and "resume=auto" not in done.stderr


def test_of_several_runs_one_that_must_not_go_on_leaves_the_others_theirs(tmp_path):
    code = """
import sys
from qarl import cli
from qarl.errors import DivergenceError
def work(config):
    print("began", config.seed)
    if config.seed < 2:
        raise DivergenceError(f"of seed {config.seed}")
cli.launch(work, "train")
"""
    command = [sys.executable, "-c", code, "--multirun", "seed=0,1,2", f"hydra.sweep.dir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("began")] == [f"began {i}" for i in range(3)]
    assert done.stderr.splitlines() == ["DivergenceError: of seed 0", "DivergenceError: of seed 1"]
