"""Files of one JSON object a line, each about one step, that survive `kill -9` and a resume."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An `OSError` of writing to an open file does not say which one; here it does."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


class StepLog:
    """Appends rows with a `step`; a row that `append` returned from is on the disk.

    Opening repairs what a killed run left: a torn line, and rows of steps that will be done again (`first_step` and
    later), are moved to `NAME.superseded.jsonl`, so that no step is counted twice and nothing is lost.
    """

    def __init__(self, path: Path, first_step: int = 0) -> None:
        kept: list[bytes] = []
        aside: list[bytes] = []
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            row = _parse(line)
            (kept if row is not None and row["step"] < first_step else aside).append(line)
        if aside:
            with open(path.with_suffix(".superseded.jsonl"), "ab") as superseded:
                superseded.write(b"".join(line.rstrip(b"\n") + b"\n" for line in aside))
            repaired = path.with_suffix(".repaired")
            repaired.write_bytes(b"".join(kept))
            os.replace(repaired, path)
        self._path = path
        self._file = open(path, "ab")

    def append(self, step: int, row: Mapping[str, Any]) -> None:
        """Non-finite floats of `row` become the strings `"nan"`, `"inf"`, `"-inf"`, which `float` reads back."""
        encoded = {name: str(v) if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
        line = json.dumps({"step": step, **encoded}, allow_nan=False) + "\n"  # ASCII: a lone surrogate stays valid
        with naming(self._path):
            self._file.write(line.encode())
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with naming(self._path):  # closing tries once more to write what a full disk refused
            self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """Whole rows in order; `[]` without a file. A torn line is left out: its writer died, or is still writing it."""
    if not path.exists():
        return []
    rows = (_parse(line) for line in path.read_bytes().splitlines(keepends=True))
    return [row for row in rows if row is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    """One row, or `None` where the line is torn: without its end, or no object with an integer `step`."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None
