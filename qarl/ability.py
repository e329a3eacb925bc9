"""What each format can do on this machine, by trial: vLLM samples with it, then each backend of the learner follows the sampler."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qarl import formats
from qarl.config import RunConfig
from qarl.errors import ConfigError
from qarl.sandbox import Broken, Sandbox
from qarl.shapes import architecture, n_experts

MODELS = ("dense", "experts")
BACKENDS = ("none", "engine", "fused", "emulated")
GARBAGE = 0.2
"""Nats a token. Other weights than the engine's are about 1 away, other roundings of the same weights less than 0.06."""
WIDTHS = {"dtype": 9, "format": 10, "model": 8, "vLLM": 11, **dict.fromkeys(BACKENDS, 11), "auto": 8}


@dataclass(frozen=True)
class Cell:
    """What came of one trial."""

    status: Literal["ok", "no", "BROKEN"]
    """`no`: refused by name."""
    why: str = ""
    gap: float | None = None
    """Of a learner from the sampler: mean |Δ log-prob|, nats a token."""


@dataclass
class Ability:
    """One format in one dtype, of one model."""

    dtype: str
    format: str
    model: str
    vllm: Cell
    written: Any
    """What the engine wrote (`trials.Written`): vLLM, or where that does not run the torch engine."""
    learner: dict[str, Cell] = field(default_factory=dict)
    """By backend. `bf16` has no backends but `none` and `auto`."""
    auto: str = "auto"
    """The backend that `auto` takes."""

    @property
    def broken(self) -> list[str]:
        cells = {"vLLM": self.vllm, **self.learner}
        where = f"{self.format} in {self.dtype}, {self.model}"
        return [f"{where}, {name}: {cell.why}" for name, cell in cells.items() if cell.status == "BROKEN"]


def abilities(sandboxes: Mapping[str, Sandbox], root: Path, dtypes: Sequence[str]) -> Iterator[Ability]:
    """In order, the models side by side. `sandboxes`: one for each of `MODELS`; `root`: the folder of `trials.make_models`."""
    lanes = {model: ThreadPoolExecutor(1) for model in MODELS}
    trials = []
    try:
        for dtype in dtypes:
            for model, lane in lanes.items():
                refusals = lane.submit(sandboxes[model].ask, "vllm_refusals", dtype, model == "experts")
                for format in formats.FORMATS:
                    trials.append(lane.submit(_try, sandboxes[model], root / model, dtype, format, refusals))
        for trial in trials:
            yield trial.result()
    finally:  # one that raised leaves others waiting, and one under way, which ends with its sandbox
        for lane in lanes.values():
            lane.shutdown(wait=False, cancel_futures=True)


def _try(sandbox: Sandbox, folder: Path, dtype: str, format: str, refusals: Future[dict[str, str | None]]) -> Ability:
    refusal = refusals.result()[format]
    vllm, written = Cell("no", refusal or ""), None
    if not refusal:
        try:
            vllm, written = Cell("ok"), sandbox.ask("sample", folder, "vllm", dtype, format)
        except (ConfigError, Broken) as error:  # refused all the same, it was promised to run
            vllm = Cell("BROKEN", str(error))
    tried = Ability(dtype, format, folder.name, vllm, written or sandbox.ask("sample", folder, "torch", dtype, format))
    refused: dict[str, str | None] = {"none": None, "auto": None}
    if formats.get(format).quantizes:
        known, tried.auto = sandbox.ask("backends", dtype, format)
        refused = {"none": None, **known}
    for backend, why in refused.items():
        tried.learner[backend] = Cell("no", why) if why else _learn(sandbox, folder, backend, tried)
    return tried


def _learn(sandbox: Sandbox, folder: Path, backend: str, tried: Ability) -> Cell:
    try:
        gap = sandbox.ask("learn", folder, backend, tried.dtype, tried.format, tried.written)
    except (ConfigError, Broken) as error:
        return Cell("BROKEN", str(error))
    if backend == "none" or gap < GARBAGE:
        return Cell("ok", gap=gap)
    return Cell("BROKEN", f"{gap:.2g} nats a token from the sampler", gap)


def unmet(run: RunConfig, tried: Sequence[Ability]) -> Iterator[str]:
    """What the run needs of these and does not get, by key."""
    known = architecture(run.model)
    models = MODELS if known is None else ("experts",) if n_experts(known) else ("dense",)
    for one in tried:
        if (one.dtype, one.format) != (run.model.dtype, run.rollout.format) or one.model not in models:
            continue
        if run.rollout.engine == "vllm" and one.vllm.status != "ok":
            yield f"rollout.format: {one.format} on vLLM, {one.model} model: {one.vllm.why}"
        backend = run.learner.backend
        if backend == "auto":
            backend = "emulated" if run.rollout.engine == "torch" and one.auto != "auto" else one.auto  # type: ignore[assignment]
        cell = one.learner.get(backend, one.learner["none"])  # bf16 ignores the backend
        if cell.status != "ok":
            yield f"learner.backend: {backend} of {one.format}, {one.model} model: {cell.why}"


class Table:
    """Lines as they come; a reason is told once and pointed at by its number."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.header = _line(dict(zip(WIDTHS, WIDTHS, strict=True)))

    def line(self, tried: Ability) -> str:
        cells = {"vLLM": tried.vllm, **tried.learner}
        shown = {name: self._shown(cell) for name, cell in cells.items()}
        chosen = {} if tried.auto == "auto" else {"auto": tried.auto}
        return _line({"dtype": tried.dtype, "format": tried.format, "model": tried.model, **shown, **chosen})

    def notes(self) -> str:
        return "\n".join(f"  [{number}] {why}" for number, why in enumerate(self.reasons, 1))

    def _shown(self, cell: Cell) -> str:
        if cell.status == "ok":
            return "ok" if cell.gap is None else f"{cell.gap:.1e}"
        if cell.why not in self.reasons:
            self.reasons.append(cell.why)
        return f"{cell.status}[{self.reasons.index(cell.why) + 1}]"


def _line(values: dict[str, str]) -> str:
    return "".join(values.get(column, "–").ljust(width) for column, width in WIDTHS.items()).rstrip()
