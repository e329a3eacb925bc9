"""Export: `python -m qarl.export run=RUN_FOLDER|model=FOLDER format=w4a16 out=FOLDER`

Writes a policy as a checkpoint that stock vLLM and stock transformers load: in compressed-tensors layout with the very codes
that the learner computes with, or as plain BF16 with `format=bf16`.

  run=FOLDER     the policy of that run's newest checkpoint, at the run's own format where none is given
  model=FOLDER   a folder in Hugging Face layout
  format=NAME    bf16, w4a16, w4a16_g32, w8a8_fp8 or w8a8_int8
  out=FOLDER     made whole or not at all; must not exist yet
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qarl import checkpoint, formats
from qarl.build import build
from qarl.cli import fail
from qarl.errors import CheckpointError, ConfigError
from qarl.rundir import load_config


@dataclass(frozen=True)
class ExportConfig:
    """What is written, and where to."""

    run: str = ""
    """Folder of a run; or `model`."""
    model: str = ""
    """Folder in Hugging Face layout."""
    format: str = ""
    """A name in `qarl.formats`; empty with `run`: that of the run's rollouts."""
    out: str = ""
    """Folder to make."""

    def __post_init__(self) -> None:
        if bool(self.run) == bool(self.model):
            raise ConfigError(f"run, model: give exactly one of them; got run={self.run!r}, model={self.model!r}")
        if not self.format and self.model:
            raise ConfigError(f"format: must be given with model=; choices: {sorted(formats.FORMATS)}")
        if self.format:
            formats.get(self.format, "format")
        if not self.out:
            raise ConfigError("out: must name the folder to make")
        if Path(self.out).exists():
            raise ConfigError(f"out: {self.out!r} exists already")


def parse(arguments: Sequence[str]) -> ExportConfig:
    """`key=value` words into a checked configuration. Raises `ConfigError`."""
    for word in arguments:
        if "=" not in word:
            raise ConfigError(f"{word!r} is not key=value; keys: run, model, format, out")
    return build(ExportConfig, dict(word.split("=", 1) for word in arguments))


def policy_of(config: ExportConfig) -> tuple[Path, str]:
    """The policy's folder and the name of the format to write it at. Raises `ConfigError`."""
    if config.model:
        return Path(config.model), config.format
    run = Path(config.run)
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"run: {config.run!r} is no run's folder: it has no config.yaml")
    newest = checkpoint.newest(run / "checkpoints")
    if newest is None:
        raise ConfigError(f"run: {config.run!r} has no complete checkpoint")
    return newest.folder / "policy", config.format or load_config(run).rollout.format


def export(config: ExportConfig) -> None:
    policy, name = policy_of(config)
    from qarl.compressed import write_checkpoint
    from qarl.rollout.vllm_settings import quantization_override

    format = formats.get(name, "format")
    covered = write_checkpoint(policy, Path(config.out), format, quantization_override(format))
    print(f"{policy} · {name} · {covered}\n  written to {config.out}")


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    try:
        export(parse(arguments))
    except (CheckpointError, ConfigError) as error:
        fail(error)


if __name__ == "__main__":
    main()
