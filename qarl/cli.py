"""From a command line to a checked configuration. Hydra composes, `qarl.build` checks; nothing heavy is imported here."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf

from qarl.build import build, check_keys, to_mapping
from qarl.config import RunConfig
from qarl.errors import CheckpointError, ConfigError, DivergenceError, EngineError, LearnerError, SyncError

CONFIGS = Path(__file__).parent / "configs"
#: What a disk answers that is full or read-only.
REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
#: group -> its options, as the folders of configs/ hold them
GROUPS = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
    for folder in sorted(CONFIGS.iterdir())
    if folder.is_dir() and not folder.name.startswith("_")
}


def launch(work: Callable[[RunConfig], None], config_name: str) -> None:
    """Compose `configs/<config_name>.yaml` with the arguments of this process and do `work` with it.

    A mistake of the user's ends with exit 2 and one message, a run that must not go on with exit 1; neither with a traceback. Of
    several (`--multirun`) the others are run all the same.
    """
    failed: list[Exception] = []

    def task(composed: DictConfig) -> None:
        try:
            work(compose_run(composed))
        except (CheckpointError, ConfigError, DivergenceError, EngineError, LearnerError, SyncError) as error:
            failed.append(error)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            failed.append(OSError(f"{error}. Free some space, then continue with resume=auto"))
        else:
            return
        tell(failed[-1])

    try:
        check_overrides(sys.argv[1:])
    except ConfigError as error:
        fail(error)
    register()
    hydra.main(version_base="1.3", config_path="pkg://qarl.configs", config_name=config_name)(task)()
    if failed:
        sys.exit(exit_code(failed[0]))


def compose(*overrides: str, config_name: str = "train") -> RunConfig:
    """The configuration of `python -m qarl.train <overrides>`, for programs. Raises `ConfigError`."""
    check_overrides(list(overrides))
    register()
    with hydra.initialize_config_module(version_base="1.3", config_module="qarl.configs"):
        return compose_run(hydra.compose(config_name, overrides=list(overrides)))


def register() -> None:
    """Offer the dataclass defaults to Hydra as the config `base`, so that every key exists and is shown."""
    ConfigStore.instance().store(name="base", node=to_mapping(RunConfig()))


def check_overrides(arguments: list[str]) -> None:
    """Raise `ConfigError` for `key=value` arguments whose key or option does not exist, with the nearest that does."""
    words = [a for a in arguments if "=" in a and not a.startswith("-")]
    try:
        overrides = OverridesParser.create().parse_overrides(words)
    except OverrideParseException:
        return  # hydra's own message shows where
    for override in overrides:
        key, option = override.key_or_group, override.value()
        if key in GROUPS and isinstance(option, str) and option not in GROUPS[key]:
            near = get_close_matches(option, GROUPS[key], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{key}: {option!r} is not one of {GROUPS[key]}{hint}")
        if key not in GROUPS and not key.startswith("hydra"):
            check_keys(RunConfig, [key])


def compose_run(composed: DictConfig) -> RunConfig:
    """The strict tree of what Hydra composed."""
    data: Any = OmegaConf.to_container(composed, resolve=True)
    return build(RunConfig, data)


def fail(error: Exception) -> None:
    """Print what the user has to know and end with a non-zero exit."""
    tell(error)
    sys.exit(exit_code(error))


def tell(error: Exception) -> None:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)


def exit_code(error: Exception) -> int:
    return 2 if isinstance(error, ConfigError) else 1
