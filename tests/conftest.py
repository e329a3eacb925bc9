"""Fixtures of all tests."""

import os
from collections.abc import Callable

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


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
