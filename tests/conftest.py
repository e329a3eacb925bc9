"""Fixtures of all tests."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Read by Triton when a kernel is defined: without a GPU its kernels run in its interpreter, on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from qarl.cli import compose
from qarl.config import RunConfig


@pytest.fixture(scope="session")
def composed() -> Callable[..., RunConfig]:
    """`composed("recipe=quickstart", "steps=3")`: the configuration of that command line."""
    return compose


@pytest.fixture
def run_benchmark(tmp_path: Path) -> Callable[..., tuple[int, list[dict[str, Any]]]]:
    """`run_benchmark(kernels, "--only", "dense")` -> exit status, rows."""

    def command(module: Any, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
        out = tmp_path / "out.json"
        status = module.main(["--tiny", "--out", str(out), *arguments])
        return status, json.loads(out.read_text())["rows"]

    return command


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
