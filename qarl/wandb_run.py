"""The W&B run beside `metrics.jsonl`: one for a run's folder, continued when the run is."""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from qarl.config import RunConfig
from qarl.rundir import write_atomically
from qarl.workspace import TABLE, save_workspace

WANDB_SECONDS = 60
SAMPLES_EVERY = 10
"""Steps between tables of responses: each is a file and an artifact of its own at W&B."""


class WandbRun:
    """A W&B run that can never end ours: what goes wrong is said once, loudly, and `metrics.jsonl` has everything.

    Its id stays in `run_dir/wandb_id`. Offline runs lie in `run_dir/wandb`; `wandb sync` (0.31 and later) joins the
    folders of a resumed run, which share the id, in order of their start. Where steps are done again, W&B keeps the
    first values it saw.
    """

    def __init__(self, run_dir: Path, config: RunConfig, console: Console) -> None:
        self._dir = run_dir
        self._console = console
        self._run: Any = None
        self._mode = config.logging.wandb
        if self._mode == "disabled":
            return
        run_id = _run_id(run_dir)
        try:
            self._run = _init(run_dir, config, run_id, self._mode)
        except Exception as error:  # wandb raises whatever its network, its service process and its key checks raise
            self._say(f"could not start {self._mode}: {error}")
            if self._mode == "online":
                self._offline_instead(config, run_id)
        if self._run is not None and self._mode == "online":
            self._make_workspace()

    def _offline_instead(self, config: RunConfig, run_id: str) -> None:
        try:
            import wandb  # which may be what failed

            wandb.teardown()  # the service process of the failed attempt holds the run id
            self._mode = "offline"
            self._run = _init(self._dir, config, run_id, "offline")
            self._console.print("W&B: recording offline instead", markup=False)
        except Exception as error:
            self._say(f"could not start offline either: {error}")

    def _make_workspace(self) -> None:
        try:
            save_workspace(self._run.entity, self._run.project)
        except Exception as error:
            self._say(f"has no workspace for this run: {error}\nMake it later: python -m qarl.workspace {self._dir}")

    def log(self, step: int, row: Mapping[str, float]) -> None:
        if self._run is not None:
            with self._survived(step):
                self._run.log(dict(row), step=step)

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The same columns in every row."""
        if self._run is not None and rows and step % SAMPLES_EVERY == 0:
            import wandb

            with self._survived(step):
                data = [[step, *map(_encodable, row.values())] for row in rows]
                self._run.log({TABLE: wandb.Table(columns=["step", *rows[0]], data=data)}, step=step)

    @contextmanager
    def _survived(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._say(f"stopped at step {step}: {error}")
            self._run = None

    def finish(self, failed: bool) -> None:
        if self._run is not None:
            try:
                self._run.finish(exit_code=1 if failed else 0)
            except Exception as error:
                self._say(f"could not finish: {error}")
        if self._run is not None and self._mode == "offline":
            self._console.print(
                f"W&B: `wandb sync {self._dir}/wandb/offline-run-*` uploads the run, "
                f"then `python -m qarl.workspace {self._dir}` makes its panels",
                markup=False,
                soft_wrap=True,
            )

    def _say(self, what: str) -> None:
        self._console.print(
            f"W&B {what}\nThe run goes on; metrics.jsonl has every number.",
            style="bold red",
            markup=False,
            soft_wrap=True,
        )


def _encodable(value: Any) -> Any:
    """A response may hold lone surrogates, which UTF-8 has no bytes for."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def _run_id(run_dir: Path) -> str:
    file = run_dir / "wandb_id"
    if not file.exists():
        write_atomically(file, secrets.token_hex(4) + "\n")  # an empty one would be refused at every start from then on
    return file.read_text().strip()


def _init(run_dir: Path, config: RunConfig, run_id: str, mode: Literal["offline", "online"]) -> Any:
    if mode == "offline":
        # Read at import: wandb's crash reports would use the network.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb  # nearly two seconds

    return wandb.init(
        project=config.logging.project,
        name=config.name,
        id=run_id,
        resume="allow" if mode == "online" else None,
        mode=mode,
        dir=run_dir,
        config=dataclasses.asdict(config),
        settings=wandb.Settings(
            silent=True,
            console="off",  # it would capture the progress display
            init_timeout=WANDB_SECONDS,
            finish_timeout=WANDB_SECONDS,
            finish_timeout_raises=True,
        ),
    )
