"""Tiny models on disk, and learner runs to compare."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "scenarios.py"


@pytest.fixture(scope="session")
def scenarios() -> ModuleType:
    """`scenarios.py` beside this file."""
    spec = importlib.util.spec_from_file_location("trainer_scenarios", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def models(scenarios: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`dense`, `tied`, `moe` -> folder."""
    root = tmp_path_factory.mktemp("models")
    return {kind: scenarios.make_model(root / kind, kind) for kind in ("dense", "tied", "moe")}


@pytest.fixture(scope="session")
def one_rank(scenarios: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """`one_rank(model=…, zero=…)`: result of a run in this process, made once for the same arguments."""
    done: dict[str, Path] = {}

    def run(**arguments: Any) -> dict[str, Any]:
        key = json.dumps(arguments, sort_keys=True, default=str)
        if key not in done:
            out = tmp_path_factory.mktemp("run")
            scenarios.run(out, **arguments)
            done[key] = out
        return {**scenarios.result(done[key]), "out": done[key]}

    return run


@pytest.fixture(scope="session")
def two_ranks(scenarios: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """`two_ranks({name: arguments of a run, …})`: their results, all made by one pair of processes."""

    def run(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
        root = tmp_path_factory.mktemp("two_ranks")
        file = root / "runs.json"
        file.write_text(json.dumps({str(root / name): arguments for name, arguments in runs.items()}, default=str))
        processes = [
            subprocess.Popen(
                [sys.executable, str(SCRIPT), str(rank), "2", f"file://{root}/meeting", str(file)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            outputs = [process.communicate(timeout=500)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)[-4000:]
        return {name: {**scenarios.result(root / name), "out": root / name} for name in runs}

    return run
