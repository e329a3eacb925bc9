"""The sink: names, the file that survives kills and resumes, W&B that cannot end a run, the display."""

import io
import json
import math
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from qarl import jsonl
from qarl.config import LoggingConfig, RunConfig
from qarl.metrics import METRICS, SAMPLE_CHARS, STAGES, Metrics, show
from qarl.mismatch import mismatch_statistics
from qarl.objectives import SUMS, finalize
from qarl.progress import duration
from qarl.records import Completion, Prompt, Sample

QUIET = RunConfig(steps=5, logging=LoggingConfig(wandb="disabled", progress=False))


def test_every_metric_has_a_unit_a_meaning_and_a_format():
    for name, metric in METRICS.items():
        assert metric.unit and len(metric.meaning) > 5, name
        assert show(name, 0.123)
        assert (metric.unit == "s") == name.endswith("_s") or name == "tokens_per_s", name
    assert "time/sample_s" in STAGES and "time/step_s" not in STAGES


def test_what_the_mathematics_reports_is_documented():
    import torch

    empty = torch.empty(0)
    sums = {name: 1.0 if name.startswith("error_") else 2.0 for name in SUMS}  # errors and the rest have units each
    reported = mismatch_statistics(empty, empty, empty.long(), 0) | finalize(sums)
    assert {"error_tokens/ratio", "error_tokens/rest_ratio"} <= set(reported) <= set(METRICS)


def test_unknown_names_and_steps_out_of_order_are_refused(tmp_path: Path):
    with Metrics.open(tmp_path, QUIET) as metrics:
        with pytest.raises(AssertionError, match="reward/maen"):
            metrics.log(0, {"reward/maen": 1.0})
        metrics.log(3, {"reward/mean": 1.0})
        with pytest.raises(AssertionError, match="step 3 is logged after step 3"):
            metrics.log(3, {"reward/mean": 1.0})
    assert jsonl.read(tmp_path / "metrics.jsonl") == [{"step": 3, "reward/mean": 1.0}]


def test_round_trip_is_valid_json_also_when_not_finite(tmp_path: Path):
    values: dict[str, Any] = {
        "grad_norm": math.nan,
        "mismatch/chi2": math.inf,
        "mismatch/k1": -math.inf,
        "lr": np.float32(0.5),
        "tokens": 3,
    }
    with Metrics.open(tmp_path, QUIET) as metrics:
        metrics.log(0, values)
        # Readable while the run goes on: nothing waits in a buffer.
        (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    row = json.loads(line, parse_constant=refuse)
    assert row.pop("step") == 0
    assert row["grad_norm"] == "nan" and row["mismatch/chi2"] == "inf" and row["mismatch/k1"] == "-inf"
    assert all(float(row[k]) == float(v) or math.isnan(float(v)) for k, v in values.items())


@pytest.mark.parametrize("torn", [b'{"step": 2, "lr": 0.', b'{"step": 2, "lr": 0.5}', b"\x00\x00\x00\n", b"7\n"])
def test_a_torn_line_is_moved_aside_on_open_and_skipped_by_readers(tmp_path: Path, torn: bytes):
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 0, "lr": 0.1}\n{"step": 1, "lr": 0.2}\n'
    path.write_bytes(whole + torn)
    assert [row["step"] for row in jsonl.read(path)] == [0, 1]
    with Metrics.open(tmp_path, QUIET, first_step=2) as metrics:
        metrics.log(2, {"lr": 0.3})
    assert path.read_bytes() == whole + b'{"step": 2, "lr": 0.3}\n'
    assert (tmp_path / "metrics.superseded.jsonl").read_bytes().strip(b"\n") == torn.strip(b"\n")


def test_resume_counts_no_step_twice_and_loses_nothing(tmp_path: Path):
    with Metrics.open(tmp_path, QUIET) as metrics:
        for step in range(5):
            metrics.log(step, {"lr": float(step)})
            metrics.log_samples(step, [sample(0)], {0: prompt(0)})
    with Metrics.open(tmp_path, QUIET, first_step=3) as metrics:
        metrics.log(3, {"lr": 30.0})
    rows = jsonl.read(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["lr"]) for row in rows] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]
    assert [row["lr"] for row in jsonl.read(tmp_path / "metrics.superseded.jsonl")] == [3.0, 4.0]
    assert [row["step"] for row in jsonl.read(tmp_path / "samples.jsonl")] == [0, 1, 2]


def test_a_killed_process_leaves_every_logged_step(tmp_path: Path):
    code = (
        "import os, pathlib; from qarl.jsonl import StepLog\n"
        f"log = StepLog(pathlib.Path({str(tmp_path / 'm.jsonl')!r}))\n"
        "for step in range(20): log.append(step, {'x': 1.0})\n"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -9
    assert [row["step"] for row in jsonl.read(tmp_path / "m.jsonl")] == list(range(20))


def prompt(i: int) -> Prompt:
    return Prompt(i, f"question {i}", np.zeros(2, np.int32), str(i))


def sample(i: int, text: str = "text", reward: float = 1.0) -> Sample:
    completion = Completion(i, 0, np.zeros(4, np.int32), np.zeros(4, np.float32), text, "stop", 0)
    return Sample(completion, np.zeros(2, np.int32), reward, 0.0)


def test_samples_are_the_first_response_of_three_prompts_and_long_texts_keep_their_ends(tmp_path: Path):
    long = "a" * SAMPLE_CHARS + "the end"
    samples = [sample(0, "first"), sample(0, "second"), sample(4, long), sample(2, "lone \ud800"), sample(3)]
    with Metrics.open(tmp_path, QUIET) as metrics:
        metrics.log_samples(0, samples, {i: prompt(i) for i in range(5)})
    rows = jsonl.read(tmp_path / "samples.jsonl")
    assert [(row["prompt_id"], row["prompt"], row["answer"]) for row in rows] == [
        (0, "question 0", "0"),
        (4, "question 4", "4"),
        (2, "question 2", "2"),
    ]
    assert rows[0]["response"] == "first" and rows[2]["response"] == "lone \ud800"
    assert len(rows[1]["response"]) < SAMPLE_CHARS + 60 and rows[1]["response"].endswith("the end")
    assert {"reward": 1.0, "tokens": 4, "finish": "stop"}.items() <= rows[0].items()


def test_without_a_terminal_the_display_is_one_plain_line_a_step(tmp_path: Path):
    out = io.StringIO()
    config = RunConfig(steps=3, logging=LoggingConfig(wandb="disabled"))
    row = {"reward/mean": 0.5, "mismatch/mean_abs": 0.00171, "tokens_per_s": 1234.4, "entropy": 1.0}
    with Metrics.open(tmp_path, config, console=Console(file=out, width=40)) as metrics:
        for step in range(3):
            metrics.log(step, row)
        metrics.log(3, {"accuracy/heldout": 0.617})
    lines = out.getvalue().splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("step 1/3 · reward 0.500 · mismatch 1.71e-03 · 1,234 tokens/s · ")
    assert lines[0].endswith(" left")
    assert lines[3] == "step 3/3 · held-out 61.7% · 0 ms left"


def test_on_a_terminal_the_display_is_a_bar_that_says_the_same(tmp_path: Path):
    out = io.StringIO()
    config = RunConfig(steps=3, logging=LoggingConfig(wandb="disabled"))
    console = Console(file=out, force_terminal=True, width=140, color_system=None)
    with Metrics.open(tmp_path, config, console=console) as metrics:
        metrics.log(0, {"reward/mean": 0.5, "tokens_per_s": 1234.4})
    assert "waiting for the first step" in out.getvalue()
    assert "step 1/3" in out.getvalue() and "reward 0.500 · 1,234 tokens/s" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0 ms"), (0.12, "120 ms"), (9.4, "9.4 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")],
)
def test_duration(seconds: float, text: str):
    assert duration(seconds) == text


def listener() -> tuple[str, list[bytes]]:
    """An address that accepts and drops connections, and what came in."""
    server, heard = socket.create_server(("127.0.0.1", 0)), []

    def serve() -> None:
        while True:
            connection, _ = server.accept()
            heard.append(connection.recv(64))
            connection.close()

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{server.getsockname()[1]}", heard


RUN_WANDB = """
import pathlib, sys
import numpy as np
from qarl import metrics, wandb_run
from qarl.config import LoggingConfig, RunConfig
from qarl.records import Completion, Prompt, Sample
wandb_run.WANDB_SECONDS = 3
config = RunConfig(steps=2, logging=LoggingConfig(wandb=sys.argv[2], progress=False))
with metrics.Metrics.open(pathlib.Path(sys.argv[1]), config, int(sys.argv[3])) as m:
    m.log(int(sys.argv[3]), {"lr": 0.5, "grad_norm": float("nan")})
    tokens, logprobs = np.zeros(4, np.int32), np.zeros(4, np.float32)
    completion = Completion(0, 0, tokens, logprobs, "lone \\ud800 response", "stop", 0)
    m.log_samples(int(sys.argv[3]), [Sample(completion, tokens, 1.0, 0.0)], {0: Prompt(0, "question", tokens, "7")})
"""


def wandb_env(url: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return clean | {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0" * 40}


def run_wandb(run_dir: Path, mode: str, first_step: int, url: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN_WANDB, str(run_dir), mode, str(first_step)]
    return subprocess.run(command, env=wandb_env(url), capture_output=True, text=True, timeout=120, cwd=run_dir)


def test_offline_wandb_writes_into_the_run_folder_uses_no_network_and_keeps_its_id(tmp_path: Path):
    url, heard = listener()
    for first_step in (0, 1):
        done = run_wandb(tmp_path, "offline", first_step, url)
        assert done.returncode == 0, done.stderr
        told = done.stderr.strip().splitlines()
        assert told == [
            f"W&B: `wandb sync {tmp_path}/wandb/offline-run-*` uploads the run, "
            f"then `python -m qarl.workspace {tmp_path}` makes its panels"
        ]
    run_id = (tmp_path / "wandb_id").read_text().strip()
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert [file.name for file in files] == [f"run-{run_id}.wandb"] * 2
    assert all(b"grad_norm" in file.read_bytes() for file in files)
    folders = [str(folder) for folder in tmp_path.glob("wandb/offline-run-*")]
    command = [sys.executable, "-m", "wandb", "sync", "--dry-run", *folders]
    sync = subprocess.run(command, env=wandb_env(url), capture_output=True, text=True, timeout=60)
    assert "Would sync 2 run(s)" in sync.stderr + sync.stdout, "the command that is told knows these folders"
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/*.table.json")
    table = json.loads(table.read_text())
    row = dict(zip(table["columns"], table["data"][0], strict=True))
    expected = {
        "step": 0,
        "prompt": "question",
        "response": "lone ? response",
        "answer": "7",
        "prompt_id": 0,
        "reward": 1.0,
        "tokens": 4,
        "finish": "stop",
    }
    assert expected.items() <= row.items()
    assert not heard
    assert [row["step"] for row in jsonl.read(tmp_path / "metrics.jsonl")] == [0, 1]


def test_an_unreachable_wandb_is_said_once_and_the_run_goes_on_offline(tmp_path: Path):
    url, heard = listener()
    done = run_wandb(tmp_path, "online", 0, url)
    assert done.returncode == 0, done.stderr
    assert heard, "the listener would notice traffic"
    assert done.stderr.count("W&B could not start online") == 1
    assert "recording offline instead" in done.stderr
    assert len(list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))) == 1
    assert jsonl.read(tmp_path / "metrics.jsonl") == [{"step": 0, "lr": 0.5, "grad_norm": "nan"}]


def test_a_wandb_that_dies_during_the_run_is_said_once(tmp_path: Path):
    class Dying:
        def log(self, *_: object, **__: object) -> None:
            raise BrokenPipeError("service process gone")

    out = io.StringIO()
    with Metrics.open(tmp_path, QUIET, console=Console(file=out)) as metrics:
        metrics._wandb._run = Dying()
        for step in range(3):
            metrics.log(step, {"lr": 0.1})
    assert out.getvalue().count("W&B stopped at step 0: service process gone") == 1
    assert len(jsonl.read(tmp_path / "metrics.jsonl")) == 3


def test_a_wandb_that_cannot_be_imported_is_said_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    out = io.StringIO()
    with Metrics.open(tmp_path, ONLINE, console=Console(file=out, width=200)) as metrics:
        metrics.log(0, {"lr": 0.1})
    said = out.getvalue()
    assert "W&B could not start online: import of wandb halted" in said and "W&B could not start offline either" in said
    assert len(jsonl.read(tmp_path / "metrics.jsonl")) == 1


class Running:
    """A W&B run that takes what it is given."""

    entity, project = "team", "sums"

    def log(self, *_: object, **__: object) -> None: ...

    def finish(self, exit_code: int) -> None: ...


ONLINE = RunConfig(steps=5, logging=LoggingConfig(wandb="online", progress=False))


def test_an_online_run_makes_its_workspace_when_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[tuple[str, str]] = []
    monkeypatch.setattr("qarl.wandb_run._init", lambda *_: Running())
    monkeypatch.setattr("qarl.wandb_run.save_workspace", lambda entity, project: made.append((entity, project)))
    with Metrics.open(tmp_path, ONLINE):
        assert made == [("team", "sums")]


def test_a_workspace_that_cannot_be_made_is_said_with_what_to_do_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(entity: str, project: str) -> str:
        raise ConnectionError(f"{entity}/{project}: no rights")

    monkeypatch.setattr("qarl.wandb_run._init", lambda *_: Running())
    monkeypatch.setattr("qarl.wandb_run.save_workspace", refuse)
    out = io.StringIO()
    with Metrics.open(tmp_path, ONLINE, console=Console(file=out)) as metrics:
        metrics.log(0, {"lr": 0.1})
    said = out.getvalue()
    assert "W&B has no workspace for this run: team/sums: no rights" in said
    assert f"python -m qarl.workspace {tmp_path}" in said
    assert len(jsonl.read(tmp_path / "metrics.jsonl")) == 1


def test_a_run_that_starts_again_in_its_folder_keeps_its_wandb_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where no checkpoint was saved yet and it begins at step 0 once more."""
    seen: list[str] = []

    def init(run_dir: Path, config: RunConfig, run_id: str, mode: str) -> Running:
        seen.append(run_id)
        return Running()

    monkeypatch.setattr("qarl.wandb_run._init", init)
    monkeypatch.setattr("qarl.wandb_run.save_workspace", lambda *_: None)
    for folder, first_step in (("a", 0), ("a", 0), ("a", 3), ("b", 0)):
        with Metrics.open(tmp_path / folder, ONLINE, first_step):
            pass
    assert len(set(seen[:3])) == 1 and seen[3] != seen[0]


def test_an_online_run_asks_wandb_to_continue_the_run_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[dict[str, Any]] = []

    def init(**settings: Any) -> Running:
        asked.append(settings)
        return Running()

    monkeypatch.setattr("wandb.init", init)
    monkeypatch.setattr("qarl.wandb_run.save_workspace", lambda *_: None)
    for first_step in (0, 3):
        with Metrics.open(tmp_path, ONLINE, first_step):
            pass
    run_id = (tmp_path / "wandb_id").read_text().strip()
    assert [(a["id"], a["resume"], a["mode"]) for a in asked] == [(run_id, "allow", "online")] * 2


def test_disabled_wandb_is_not_even_imported(tmp_path: Path):
    code = RUN_WANDB + "\nassert 'wandb' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tmp_path), "disabled", "0"], check=True, timeout=60)
    assert not (tmp_path / "wandb").exists() and not (tmp_path / "wandb_id").exists()
