"""Rows of a benchmark: measured, refused or failed, kept as they finish, judged against bars, shown as short tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from qarl.errors import ConfigError

Row = dict[str, Any]
OPTIONAL = ("qarl.kernels", "vllm", "triton")
"""Packages a backend may lack on a machine: its rows are then refused, not failed."""


class DeviceLost(RuntimeError):
    """The device answers nothing any more: every row after this one would fail for that alone."""


@dataclass(frozen=True)
class Bar:
    """What a row's value must reach."""

    what: str
    key: str
    """Of the row's value."""
    limit: float
    at_least: bool = False
    """Otherwise: at most."""

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:.3g}"


@dataclass
class Report:
    """All rows of one command."""

    out: Path | None
    """`None`: shown only."""
    more: dict[str, Any] = field(default_factory=dict)
    """What stands in the file beside the rows."""
    rows: list[Row] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)

    def add(self, row: Row, measure: Callable[[], Row], *bars: Bar) -> Row:
        """Measure, judge, print and keep a row. Whatever goes wrong is in it, and the run goes on.

        Raises `DeviceLost` after an error that leaves the device unusable.
        """
        lost = None
        try:
            row |= measure()
        except (ConfigError, ModuleNotFoundError) as error:
            optional = isinstance(error, ConfigError) or (error.name or "").startswith(OPTIONAL)
            row["refused" if optional else "failed"] = str(error)
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error)[:500]}"
            # An OutOfMemoryError is not one of these: it leaves the device as it was.
            lost = error if isinstance(error, torch.AcceleratorError) else None
        row["bars"] = dict.fromkeys(bar.what for bar in bars)
        self.bars += [bar for bar in bars if bar not in self.bars]
        self.rows.append(row)
        self.judge()
        print(_line(row), flush=True)
        self.save()
        if lost is not None:
            raise DeviceLost(str(lost)) from lost
        return row

    def judge(self) -> None:
        """Each row by its bars; once more by whoever gives rows that stand here the values that bars are of."""
        for row in self.rows:
            for bar in self.bars:
                if bar.what in row["bars"] and row.get(bar.key) is not None:
                    row["bars"][bar.what] = bar.met(row[bar.key])

    def run(self, groups: dict[str, Callable[[], None]]) -> None:
        """Each group adds its rows; one that breaks outside its rows leaves a failed row."""
        with suppress(DeviceLost):
            for name, group in groups.items():
                try:
                    group()
                except DeviceLost:
                    raise
                except Exception as error:
                    self.fail({"group": name}, error)

    def fail(self, row: Row, error: Exception) -> Row:
        """A row for what broke outside the measured ones."""

        def measure() -> Row:
            raise error

        return self.add(row, measure)

    def save(self) -> None:
        if self.out is not None:
            record.write_file(self.out, self.rows, **self.more)

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows if "failed" in row]

    def verdicts(self) -> str:
        """A line a bar: how many of its rows meet it, and the worst of them."""
        lines = []
        for bar in self.bars:
            rows = [row for row in self.rows if bar.what in row["bars"]]
            measured = sorted((r for r in rows if r.get(bar.key) is not None), key=lambda r: r[bar.key])
            worst = (measured[0] if bar.at_least else measured[-1]) if measured else None
            met = sum(bool(row["bars"][bar.what]) for row in rows)
            verdict = "not measured" if worst is None else "MET" if met == len(rows) else "NOT MET"
            line = {"bar": f"{bar.what} {bar}", "verdict": verdict, "rows": f"{met}/{len(rows)}"}
            lines.append({**line, "worst": worst[bar.key] if worst else None, "where": label(worst) if worst else "–"})
        return record.table(lines, {"bar": "", "verdict": "", "rows": "", "worst": ".3f", "where": ""})

    def troubles(self) -> str:
        """Failed and refused rows, the same reason once."""
        reasons: dict[str, list[Row]] = {}
        for row in self.rows:
            for kind in ("failed", "refused"):
                if kind in row:
                    reasons.setdefault(f"{kind.upper()}: {row[kind][:160]}", []).append(row)
        return "\n".join(f"{why}  ({len(rows)} rows, first: {label(rows[0])})" for why, rows in reasons.items())


def pivot(rows: Sequence[Row], index: Sequence[str], column: Callable[[Row], str], value: str, spec: str) -> str:
    """A line for each combination of `index`, a column for each name that `column` gives."""
    lines: dict[tuple, Row] = {}
    columns: dict[str, str] = dict.fromkeys(index, "")
    for row in rows:
        line = lines.setdefault(tuple(row.get(k) for k in index), {k: row.get(k, "–") for k in index})
        columns[column(row)] = spec
        line[column(row)] = row.get(value)
    return record.table(list(lines.values()), columns)


def label(row: Row) -> str:
    """Which row: its text and its sizes, without what was measured."""
    names = ("group", "layer", "case", "m", "format", "backend", "pass")
    return " ".join(str(row[name]) for name in names if row.get(name) is not None)


def _line(row: Row) -> str:
    numbers = [f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float)]
    trouble = [f"{kind}: {row[kind]}" for kind in ("refused", "failed") if kind in row]
    missed = [f"MISSED {bar}" for bar, met in row["bars"].items() if met is False]
    return "  ".join([label(row), *numbers, *trouble, *missed])
