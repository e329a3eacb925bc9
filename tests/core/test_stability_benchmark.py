"""The stability benchmark: arms differ in what they name, runs are limited and resumed, rows survive, figures are of the rows."""

import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks import stability
from benchmarks.stability_arms import ARMS, BASELINE, TABLE, Arm, Job, schedule
from benchmarks.stability_figures import conclude, draw, reached, series, step_seconds, until
from benchmarks.stability_models import worked
from benchmarks.stability_runs import Command, Rows, run
from qarl.build import to_mapping
from qarl.errors import ConfigError

OBJECTIVE = "algorithm.objective."


def flat(tree: Any, path: str = "") -> dict[str, Any]:
    """Dotted key -> leaf."""
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    return {
        key: leaf for name, value in tree.items() for key, leaf in flat(value, f"{path}.{name}".lstrip(".")).items()
    }


def difference(composed: Any, one: str, other: str, seeds: tuple[int, int] = (0, 0)) -> dict[str, tuple[Any, Any]]:
    """Keys at which the configurations of two arms differ, besides the run's name."""
    mine, theirs = (
        flat(to_mapping(composed(*Job("dense", arm, seed).overrides(Path("w")))))
        for arm, seed in zip((one, other), seeds, strict=True)
    )
    assert mine.keys() == theirs.keys()
    return {key: (mine[key], theirs[key]) for key in mine if mine[key] != theirs[key] and key != "name"}


@pytest.mark.parametrize(
    "one, other, expected",
    [
        ("bf16-bf16-gspo", "w4a16-bf16-gspo", {"rollout.format": ("bf16", "w4a16")}),
        ("w4a16-bf16-gspo", "w8a8_int8-bf16-gspo", {"rollout.format": ("w4a16", "w8a8_int8")}),
        ("w4a16-bf16-gspo", "w8a8_fp8-bf16-gspo", {"rollout.format": ("w4a16", "w8a8_fp8")}),
        ("w4a16-bf16-gspo", "w4a16-aligned-gspo", {"learner.backend": ("none", "auto")}),
        (
            "w4a16-bf16-gspo",
            "w4a16-bf16-gspo-tis",
            {OBJECTIVE + "correction.kind": ("none", "tis"), OBJECTIVE + "correction.level": ("sequence", "token")},
        ),
        (
            "w4a16-bf16-gspo",
            "w4a16-bf16-gspo-mis",
            {
                OBJECTIVE + "correction.kind": ("none", "mis"),
                OBJECTIVE + "correction.level": ("sequence", "sequence_sum"),
            },
        ),
        (
            "w4a16-aligned-gspo",
            "w4a16-aligned-tbpo",
            {OBJECTIVE + "correction.kind": ("none", "tis"), OBJECTIVE + "bounds.negative_high": (None, 7e-3)},
        ),
        (
            "w4a16-aligned-gspo",
            "w4a16-aligned-dual_clip",
            {
                OBJECTIVE + "ratio": ("sequence", "token"),
                OBJECTIVE + "bounds.positive_high": (4e-3, 0.2),
                OBJECTIVE + "bounds.negative_low": (3e-3, 0.2),
                OBJECTIVE + "bounds.negative_high": (None, 2.0),
            },
        ),
        ("w4a16-aligned-tbpo", "w8a8_int8-aligned-tbpo", {"rollout.format": ("w4a16", "w8a8_int8")}),
        ("w4a16-aligned-tbpo", "w8a8_fp8-aligned-tbpo", {"rollout.format": ("w4a16", "w8a8_fp8")}),
    ],
)
def test_arms_differ_from_their_neighbour_in_what_they_name_alone(composed, one, other, expected):
    assert difference(composed, one, other) == expected


@pytest.mark.parametrize("arm", ARMS)
def test_seeds_of_an_arm_differ_in_the_seed_alone(composed, arm):
    assert difference(composed, arm, arm, (0, 1)) == {"seed": (0, 1)}


def test_the_aligned_tbpo_arm_is_the_recipe_itself(composed):
    mine = flat(to_mapping(composed(*Job("dense", "w4a16-aligned-tbpo", 0).overrides(Path("runs/stability")))))
    recipe = flat(to_mapping(composed("recipe=stability_gpu")))
    assert {key for key in recipe if recipe[key] != mine[key]} == {"name", "out"}


@pytest.mark.parametrize("arm", [arm.name for arm in TABLE])
def test_smollm2_takes_int4_in_groups_that_divide_its_width(composed, arm):
    job = Job("smollm2", arm, 0)
    expected = ARMS[arm].format.replace("w4a16", "w4a16_g32")
    assert composed(*job.overrides(Path("w"))).rollout.format == job.format == expected


def test_a_wider_band_reaches_sequence_ratios_alone(composed):
    wider = ("algorithm.objective.bounds.positive_high=0.01", "algorithm.objective.bounds.negative_high=0.03")

    def bounds(arm: str) -> tuple[float | None, ...]:
        found = composed(*Job("dense", arm, 0).overrides(Path("w"), wider)).algorithm.objective.bounds
        return found.positive_high, found.negative_low, found.negative_high

    assert bounds("w4a16-aligned-tbpo") == (0.01, 3e-3, 0.03)
    assert bounds("w4a16-aligned-gspo") == (0.01, 3e-3, None)
    assert bounds("w4a16-aligned-dual_clip") == (0.2, 0.2, 2.0)


def test_whole_seeds_of_the_table_come_first():
    jobs = schedule(["dense", "moe"], list(ARMS), [0, 1])
    table = [arm.name for arm in TABLE]
    assert [(j.model, j.seed) for j in jobs[: 2 * len(table)]] == [("dense", s) for s in (0, 1) for _ in table]
    assert [j.arm for j in jobs[: len(table)]] == table
    assert len(set(jobs)) == len(jobs) == 2 * 2 * len(ARMS)
    assert jobs[len(jobs) // 2].model == "moe"
    assert schedule(["moe"], [BASELINE, BASELINE], [0, 1, 0]) == [Job("moe", BASELINE, seed) for seed in (0, 1)]


def test_names_of_arms_are_whole_and_distinct():
    assert len({arm.label for arm in ARMS.values()}) == len(ARMS) == 11
    assert Arm("w4a16", "aligned", "dual_clip").name in ARMS and BASELINE in ARMS


def test_worked_steps_end_in_the_sum():
    assert worked("12 + 34 - 56 =") == "12+34=46\n46-56=-10\n-10"


JOBS = [(Job("tiny", arm, 0), (f"name={arm}",)) for arm in list(ARMS)[:3]]

CHILD = """
import json, sys, time
folder, seconds, code = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
import pathlib
pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
with open(folder + "/metrics.jsonl", "w") as file:
    file.write(json.dumps({"step": 0, "reward/mean": 0.25, "accuracy/heldout": 0.123456789}) + "\\n")
if code == 1:
    print("DivergenceError: the gradient is NaN")
time.sleep(seconds)
sys.exit(code)
"""


def fake(work: Path, seconds: dict[str, float] | None = None, codes: dict[str, int] | None = None) -> Command:
    """Runs that log one step, then sleep and exit as told; remembers what was started."""

    def command(job: Job, overrides: tuple[str, ...]) -> list[str]:
        folder = str(work / "runs" / job.name)
        return [
            sys.executable,
            "-c",
            CHILD,
            folder,
            str((seconds or {}).get(job.arm, 0)),
            str((codes or {}).get(job.arm, 0)),
        ]

    return command


def states(file: Path) -> dict[str, tuple[str, int]]:
    return {row["arm"]: (row["status"], row["steps"]) for row in json.loads(file.read_text())["rows"]}


def test_a_row_is_on_the_disk_as_soon_as_its_run_ends(tmp_path, monkeypatch):
    out, written = tmp_path / "out.json", []
    put = Rows.put

    def watched(self: Rows, row: dict[str, Any]) -> None:
        put(self, row)
        written.append(states(out))

    monkeypatch.setattr(Rows, "put", watched)
    run(JOBS, Rows(out), tmp_path, ["", ""], math.inf, fake(tmp_path))
    assert [len(seen) for seen in written] == [1, 2, 3]
    rows = json.loads(out.read_text())["rows"]
    assert rows[0]["curves"] == {"step": [0], "accuracy/heldout": [0.12346], "reward/mean": [0.25]}
    assert list(tmp_path.glob("*.draft")) == []


def test_at_the_limit_runs_are_stopped_and_their_rows_kept(tmp_path):
    out, started = tmp_path / "out.json", time.monotonic()
    slow = {JOBS[1][0].arm: 600.0}
    run(JOBS, Rows(out), tmp_path, ["", "", ""], 8.0, fake(tmp_path, slow))
    assert time.monotonic() - started < 30
    assert states(out) == {
        JOBS[0][0].arm: ("finished", 1),
        JOBS[1][0].arm: ("stopped", 1),
        JOBS[2][0].arm: ("finished", 1),
    }


FAMILY = """
import signal, subprocess, sys
ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
groups = {"same": {}, "own": {"process_group": 0}}
for options in groups.values():
    child = subprocess.Popen([sys.executable, "-c", ignore], stdout=subprocess.PIPE, **options)
    child.stdout.readline()
    print(child.pid, flush=True)
signal.pause() if sys.argv[1] == "waits" else sys.exit(3)
"""


@pytest.mark.parametrize("end", ["waits", "dies"])
def test_nothing_of_a_run_outlives_it(tmp_path, end):
    """Be it stopped or dead of itself: also what ignores SIGTERM, and what is in another process group, as Ray's actors are."""
    seconds = 6.0 if end == "waits" else math.inf
    command = [sys.executable, "-c", FAMILY, end]
    run(JOBS[:1], Rows(tmp_path / "out.json"), tmp_path, [""], seconds, lambda job, overrides: command)
    pids = [int(line) for line in (tmp_path / "runs" / f"{JOBS[0][0].name}.log").read_text().split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(map(goes_on, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(goes_on, pids))


def goes_on(pid: int) -> bool:
    """A process that nobody waits for is a zombie: it has ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_runs_are_stopped_where_the_benchmark_is_told_to_end(tmp_path):
    out = tmp_path / "out.json"
    before = signal.getsignal(signal.SIGTERM)
    threading.Timer(4.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(SystemExit):
        run(JOBS[:1], Rows(out), tmp_path, [""], 60.0, fake(tmp_path, {JOBS[0][0].arm: 600.0}))
    assert states(out) == {JOBS[0][0].arm: ("stopped", 1)}
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_never_began_has_no_steps_of_the_one_before_it(tmp_path):
    out = tmp_path / "out.json"
    run(JOBS[:1], Rows(out), tmp_path, [""], math.inf, fake(tmp_path))
    assert states(out) == {JOBS[0][0].arm: ("finished", 1)}
    run(
        JOBS[:1],
        Rows(out),
        tmp_path,
        [""],
        math.inf,
        lambda job, overrides: [sys.executable, "-c", "raise SystemExit(3)"],
    )
    assert states(out) == {JOBS[0][0].arm: ("failed", 0)}


def test_two_benchmarks_never_write_one_file(tmp_path):
    first = Rows(tmp_path / "out.json")
    with pytest.raises(ConfigError, match="--out: another benchmark is writing"):
        Rows(first.file)
    del first
    Rows(tmp_path / "out.json")


def test_a_second_call_does_what_is_left(tmp_path):
    out = tmp_path / "out.json"
    run(JOBS, Rows(out), tmp_path, [""], math.inf, fake(tmp_path, codes={JOBS[0][0].arm: 3, JOBS[1][0].arm: 1}))
    assert [states(out)[job.arm][0] for job, _ in JOBS] == ["failed", "diverged", "finished"]
    again = Rows(out)
    left = [(job, overrides) for job, overrides in JOBS if not again.finished(job, overrides)]
    assert left == JOBS[:1]  # a run that diverged has ended
    run(left, again, tmp_path, [""], math.inf, fake(tmp_path))
    assert sorted(state for state, _ in states(out).values()) == ["diverged", "finished", "finished"]


def test_what_fails_is_tried_once_more_behind_the_others(tmp_path):
    started: list[str] = []
    inner = fake(tmp_path, codes={JOBS[0][0].arm: 3, JOBS[1][0].arm: 1})

    def command(job: Job, overrides: tuple[str, ...]) -> list[str]:
        started.append(job.arm)
        return inner(job, overrides)

    run(JOBS, Rows(tmp_path / "out.json"), tmp_path, [""], math.inf, command)
    first, second, third = (job.arm for job, _ in JOBS)
    assert started == [first, second, third, first]  # the second diverged, which no other try would change


def test_a_row_of_other_settings_is_not_taken_for_this_run(tmp_path):
    rows = Rows(tmp_path / "out.json")
    run(JOBS[:1], rows, tmp_path, [""], math.inf, fake(tmp_path))
    with pytest.raises(ConfigError, match="with other settings.*steps=3"):
        rows.finished(JOBS[0][0], (*JOBS[0][1], "steps=3"))
    rows.rows[0]["overrides"] = ["a=1", "a=2"]  # hydra takes the last word
    with pytest.raises(ConfigError, match="with other settings, the same ones in another order; choose another --out"):
        rows.finished(JOBS[0][0], ("a=2", "a=1"))


def test_no_run_begins_that_cannot_end(tmp_path):
    """The first takes three seconds, more than is left for the others."""
    seconds = {job.arm: 3.0 for job, _ in JOBS}
    run(JOBS, Rows(tmp_path / "out.json"), tmp_path, [""], 5.5, fake(tmp_path, seconds))
    assert states(tmp_path / "out.json") == {JOBS[0][0].arm: ("finished", 1)}


def test_gpus_get_as_many_runs_as_slots_name_them(tmp_path):
    run(
        JOBS, Rows(tmp_path / "out.json"), tmp_path, ["3", "5"], math.inf, fake(tmp_path, {j.arm: 1.0 for j, _ in JOBS})
    )
    gpus = [row["gpu"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]]
    assert set(gpus) == {"3", "5"} and len(gpus) == 3
    run(JOBS[:1], Rows(tmp_path / "out.json"), tmp_path, ["3", "3", "5"], math.inf, fake(tmp_path))
    jobs = {row["arm"]: row["jobs_a_gpu"] for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert jobs == {job.arm: 2 if job == JOBS[0][0] else 1 for job, _ in JOBS}, "each row as it was measured"


def finished(arm: str, seed: int, accuracy: list[float | None], seconds: float) -> dict[str, Any]:
    n = len(accuracy)
    times = {
        "time/step_s": [seconds + (9.0 if value is not None else 0.0) for value in accuracy],
        "time/evaluate_s": [9.0 if value is not None else None for value in accuracy],
        "time/sample_s": [seconds / 2] * n,
    }
    curves = {
        "step": list(range(n)),
        "accuracy/heldout": accuracy,
        "entropy": [0.1] * n,
        "mismatch/mean_abs": [1e-3] * n,
        **times,
    }
    return {"model": "dense", "arm": arm, "seed": seed, "status": "finished", "steps": n - 1, "curves": curves}


ROWS = [
    finished(BASELINE, 0, [0.3, None, 0.5, None, 0.8], 2.0),
    finished(BASELINE, 1, [0.3, None, 0.4, None, 0.6], 2.0),
    finished("w4a16-bf16-gspo", 0, [0.2, None, 0.4, None, 0.7], 1.0),
    finished("w4a16-bf16-gspo", 1, [0.2, None, 0.4, None, 0.4], 1.0),
    {**finished("w4a16-aligned-tbpo", 0, [0.2], 1.0), "status": "stopped"},
]


def test_the_table_compares_seed_by_seed_and_leaves_unfinished_runs_out():
    base, low = conclude(ROWS)
    assert (low["arm"], low["seeds"], low["first"]) == ("w4a16-bf16-gspo", 2, 0.2)
    assert low["last"] == pytest.approx(0.55) and low["spread"] == pytest.approx(math.sqrt(0.045))
    assert low["points"] == pytest.approx(-15.0) and base["points"] == 0.0
    assert low["speed"] == pytest.approx(2.0) and low["step_s"] == pytest.approx(1.0)


def test_chances_of_policies_are_of_the_formats_that_were_looked_at():
    """A machine may not have the arm's format."""
    looked = [
        row | {"policy": {"bf16": 0.25, **more}} for row, more in zip(ROWS[2:4], ({"w4a16": 0.5}, {}), strict=True)
    ]
    (found,) = conclude(looked)
    assert (found["policy_bf16"], found["policy_served"]) == (0.25, 0.5)
    assert conclude([row | {"policy": {"bf16": 0.25}} for row in ROWS[2:3]])[0]["policy_served"] is None


def test_wall_clock_to_an_accuracy_counts_training_alone():
    assert list(step_seconds(ROWS[0])) == [2.0] * 5
    assert reached(ROWS[0], 0.5) == 4.0  # after the steps 0 and 1
    assert reached(ROWS[0], 0.3) == 0.0 and reached(ROWS[0], 0.9) is None
    assert [row["reached_s"] for row in conclude(ROWS)] == [6.0, None]


def test_series_are_of_steps_that_all_rows_measured():
    steps, values = series(ROWS[:2], "accuracy/heldout")
    assert steps.tolist() == [0, 2, 4] and values.tolist() == [[0.3, 0.5, 0.8], [0.3, 0.4, 0.6]]


def test_runs_are_looked_at_where_all_of_them_came():
    stopped = ROWS[0] | {"status": "stopped"}
    early, late, short = until([stopped], 2), until([stopped], 4), until([stopped], 9)
    assert [(rows[0]["status"], rows[0]["steps"]) for rows in (early, late, short)] == [
        ("finished", 2),
        ("finished", 4),
        ("stopped", 4),
    ]
    assert conclude(early)[0]["last"] == 0.5 and conclude(late)[0]["last"] == 0.8 and not conclude(short)
    assert stopped["curves"] == ROWS[0]["curves"] and stopped["status"] == "stopped"


def test_a_figure_for_each_model_with_a_line_an_arm(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    kept: list[Figure] = []
    save = Figure.savefig

    def watched(self: Figure, *arguments: Any, **options: Any) -> None:
        kept.append(self)
        save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", watched)
    written = draw(ROWS, tmp_path / "result.json")
    assert [file.name for file in written] == ["result_dense.png"] and written[0].stat().st_size > 10_000
    accuracy = kept[0].axes[0]
    assert {line.get_label(): list(np.asarray(line.get_ydata())) for line in accuracy.lines} == {
        ARMS[BASELINE].label: pytest.approx([0.3, 0.45, 0.7]),
        ARMS["w4a16-bf16-gspo"].label: pytest.approx([0.2, 0.4, 0.55]),
    }


@pytest.mark.parametrize(
    "words, said",
    [
        (["run", "--arms", "bf17"], "ConfigError: --arms: unknown ['bf17']; choices: ['bf16-bf16-gspo', "),
        (["--seeds", "0"], "ConfigError: --models: no {}/models/dense; python -m benchmarks.stability warm makes it"),
    ],
)
def test_mistakes_are_named_in_a_line_before_anything_starts(tmp_path, capsys, words, said):
    with pytest.raises(SystemExit) as ended:
        stability.main([*words, "--work", str(tmp_path), "--out", str(tmp_path / "out.json")])
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and line.startswith(said.format(tmp_path))


@pytest.mark.parametrize(
    "words",
    [
        "run learner.optimizer.lr=1e-4 steps=3 --seeds 0 1 --jobs 2",
        "run --seeds 0 1 learner.optimizer.lr=1e-4 --jobs 2 steps=3",
        "--jobs=2 --seeds 0 1 learner.optimizer.lr=1e-4 steps=3",
        "run --jobs 2 --seeds 0 1 -- learner.optimizer.lr=1e-4 steps=3",
    ],
)
def test_overrides_may_stand_behind_any_option(monkeypatch, words):
    seen: list[Any] = []
    monkeypatch.setattr(stability, "_run", seen.append)
    stability.main(words.split())
    assert seen[0].overrides == ["learner.optimizer.lr=1e-4", "steps=3"]
    assert (seen[0].seeds, seen[0].jobs) == ([0, 1], 2)


def test_a_warm_start_ends_at_its_target_and_saves_a_model_that_serves(tmp_path, monkeypatch):
    """Chances are of the worked answer: the product of its tokens' probabilities, by transformers' own forward."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks import stability_models

    pytest.importorskip("reasoning_gym")
    stability_models.write_data(tmp_path / "data", 3, 1, {"warm": 20, "heldout": 3, "check": 3})
    seen = iter([0.1, 0.2, 0.4, 0.9])
    monkeypatch.setattr(stability_models, "chance", lambda *_: next(seen))
    found = stability_models.warm("tiny", tmp_path, target=0.3, every=2, steps=10, limit_s=math.inf, gguf="")
    assert found["steps"] == 6 and found["reached"]
    folder = tmp_path / "models" / "tiny"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )
    rows = [json.loads(line) for line in (tmp_path / "data" / "heldout.jsonl").read_text().splitlines()]
    expected = []
    for row in rows:
        text = f"<|user|>{row['question']}<|end|><|assistant|>"
        asked, answer = (tokenizer(t)["input_ids"] for t in (text, worked(row["question"]) + "<|end|>"))
        with torch.no_grad():
            logprobs = model(torch.tensor([asked + answer])).logits[0].log_softmax(-1)
        expected.append(math.exp(sum(float(logprobs[len(asked) + i - 1, t]) for i, t in enumerate(answer))))
    assert stability_models.chances(folder, tmp_path / "data", ["bf16"])["bf16"] == pytest.approx(
        np.mean(expected), rel=1e-3
    )


@pytest.mark.parametrize("limit_s, steps", [(0.0, 1), (math.inf, 40)])
def test_a_warm_start_that_ends_without_its_target_is_looked_at_as_it_is_saved(tmp_path, monkeypatch, limit_s, steps):
    from benchmarks import stability_models

    pytest.importorskip("reasoning_gym")
    stability_models.write_data(tmp_path / "data", 3, 1, {"warm": 20, "check": 3})
    looks = iter([0.5])
    monkeypatch.setattr(stability_models, "chance", lambda *_: next(looks))
    found = stability_models.warm("tiny", tmp_path, target=0.3, every=1000, steps=40, limit_s=limit_s, gguf="")
    assert (found["steps"], found["reached"], list(looks)) == (steps, True, [])


def test_no_question_stands_in_two_files(tmp_path):
    pytest.importorskip("reasoning_gym")
    from benchmarks.stability_models import write_data

    write_data(tmp_path, 2, 1, {"warm": 30, "heldout": 30})  # of at most 2 x 81 questions
    questions = [json.loads(line)["question"] for f in tmp_path.glob("*.jsonl") for line in f.read_text().splitlines()]
    assert len(questions) == len(set(questions)) == 60


def test_sums_too_short_for_so_many_questions_are_refused(tmp_path):
    pytest.importorskip("reasoning_gym")
    from benchmarks.stability_models import write_data

    with pytest.raises(ConfigError, match="--terms, --digits: 2 and 1 make too few sums, train.jsonl lacks "):
        write_data(tmp_path, 2, 1, {"train": 200})  # of at most 2 x 81 questions
