"""Fixtures of all tests."""

from collections.abc import Callable

import pytest

from qarl.cli import compose
from qarl.config import RunConfig


@pytest.fixture(scope="session")
def composed() -> Callable[..., RunConfig]:
    """`composed("recipe=quickstart", "steps=3")`: the configuration of that command line."""
    return compose
