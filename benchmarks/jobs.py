"""A part of a benchmark in a process of its own: engines do not share one well, and a part that hangs costs itself alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: Of every job; what our engine wants of vLLM it says itself.
ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "WARNING", "TOKENIZERS_PARALLELISM": "false"}


def run_job(words: Sequence[str], out: Path, environment: Mapping[str, str], limit: float) -> dict[str, Any]:
    """Run `python -m WORDS`, at most `limit` seconds; what it wrote to `out`, as far as it got, and `job_seconds`.

    Its log lies beside `out`; where it failed, `error` holds the end of it. What it started ends with it.
    """
    log = out.with_suffix(".log")
    out.unlink(missing_ok=True)
    started = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            stdout=stream,
            stderr=stream,
            env={**os.environ, **ENVIRONMENT, **environment},
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    if status != 0:
        what = f"killed after {limit:.0f} s" if status is None else f"ended with status {status}"
        found["error"] = f"{what}; the end of {log}:\n{log.read_text()[-1500:]}"
    seconds = time.monotonic() - started
    print(f"{out.stem}: {seconds:.0f} s{' FAILED' if status != 0 else ''}", file=sys.stderr, flush=True)
    return found | {"job_seconds": seconds}
