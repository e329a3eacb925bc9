"""Fixtures of all tests."""

from collections.abc import Callable

import pytest
from hydra import compose, initialize_config_module

from qarl.cli import compose_run, register
from qarl.config import RunConfig


@pytest.fixture(scope="session")
def composed() -> Callable[..., RunConfig]:
    """`composed("recipe=quickstart", "steps=3")`: the configuration of that command line."""

    def compose_overrides(*overrides: str) -> RunConfig:
        register()
        with initialize_config_module(version_base="1.3", config_module="qarl.configs"):
            return compose_run(compose("train", overrides=list(overrides)))

    return compose_overrides
