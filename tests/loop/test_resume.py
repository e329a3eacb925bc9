"""What a run continues from, and what it saves when it must not go on; the learner is a stand-in that writes one file."""

import json
import os
import resource
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qarl import checkpoint, loop
from qarl.config import GuardConfig, LoggingConfig
from qarl.errors import CheckpointError, ConfigError, DivergenceError, LearnerError
from qarl.guard import Guard
from qarl.metrics import Metrics
from qarl.prepare import Inputs
from qarl.prompts import PromptStream
from qarl.records import Prompt, Standing
from qarl.rundir import open_run


class Learner:
    def __init__(self, contract_hash: str = "aaaa") -> None:
        self.standing = Standing(contract_hash, "all of it", "emulated")
        self.loaded: list[Path] = []

    def save(self, folder: Path) -> None:
        (folder / "weights").write_bytes(os.urandom(1000))

    def load(self, folder: Path) -> None:
        self.loaded.append(folder)


def cluster(contract_hash: str = "aaaa") -> Any:
    return SimpleNamespace(learner=Learner(contract_hash))


def inputs() -> Inputs:
    prompts = tuple(Prompt(i, str(i), np.array([i], np.int32), "") for i in range(10))
    return Inputs("folder", PromptStream(prompts, seed=0, shuffle=True), prompts[:1], prompts[:1])


def guard() -> Guard:
    return Guard(GuardConfig(), print)


def ids(prompts) -> list[int]:
    return [p.id for p in prompts]


@pytest.fixture
def config(small, tmp_path):
    return small(f"out={tmp_path}", "resume=auto", "checkpoint.keep=5")


def test_a_run_continues_with_the_learner_and_the_prompts_of_its_newest_checkpoint(config, capsys):
    before, there = inputs(), open_run(config)
    before.train.take(7)
    folder = loop.save(there.checkpoints, config, cluster(), before, guard(), 2)

    again, same = open_run(config), cluster()
    after = inputs()
    loop.restore(again, same, after, guard())
    assert again.first_step == 2 and same.learner.loaded == [folder]
    assert ids(after.train.take(7)) == ids(before.train.take(7))
    assert f"resumed from {folder}" in capsys.readouterr().err


def test_a_truncated_checkpoint_is_passed_over_for_the_previous_one(config, capsys):
    before, there = inputs(), open_run(config)
    before.train.take(4)
    good = loop.save(there.checkpoints, config, cluster(), before, guard(), 2)
    expected = ids(before.train.take(4))
    torn = loop.save(there.checkpoints, config, cluster(), before, guard(), 4)
    os.truncate(torn / "weights", 10)

    again, same, after = open_run(config), cluster(), inputs()
    loop.restore(again, same, after, guard())
    assert again.first_step == 2 and same.learner.loaded == [good]
    assert ids(after.train.take(4)) == expected
    assert "step-000004 is damaged" in capsys.readouterr().err


def test_a_checkpoint_of_another_contract_is_refused_with_both_hashes(config):
    loop.save(open_run(config).checkpoints, config, cluster("aaaa"), inputs(), guard(), 2)
    other = cluster("bbbb")
    with pytest.raises(CheckpointError, match="step-000002 was made under contract aaaa, this run's is bbbb"):
        loop.restore(open_run(config), other, inputs(), guard())
    assert other.learner.loaded == []


@pytest.mark.parametrize(
    "key, missing", [(("guard",), "guard"), (("guard", "warned"), "guard.warned"), (("prompts",), "prompts")]
)
def test_a_checkpoint_that_lacks_a_part_is_refused_with_what_to_do(config, key, missing):
    """As those saved before there was a guard."""
    folder = loop.save(open_run(config).checkpoints, config, cluster(), inputs(), guard(), 2)
    there = open_run(config)
    assert there.resumed is not None
    state = json.loads(json.dumps(there.resumed.state))
    *path, last = key
    del (state[path[0]] if path else state)[last]
    older, fresh = replace(there, resumed=replace(there.resumed, state=state)), cluster()
    with pytest.raises(CheckpointError, match=f"state.json: {missing} missing: .* model.path={folder / 'policy'}"):
        loop.restore(older, fresh, inputs(), guard())
    assert fresh.learner.loaded == []


def test_a_configuration_of_another_version_is_named_with_its_file(config):
    file = open_run(config).path / "config.yaml"
    file.write_text(file.read_text().replace("guard:", "guard:\n  max_mismatch: 1.0"))
    with pytest.raises(ConfigError, match=f"{file}: guard.max_mismatch: unknown key.* choose another name="):
        open_run(config)


def test_without_a_checkpoint_nothing_is_restored(config):
    fresh = cluster()
    loop.restore(open_run(config), fresh, inputs(), guard())
    assert fresh.learner.loaded == []


@pytest.mark.parametrize("healthy", [True, False])
def test_a_diverged_state_is_saved_apart_and_the_last_healthy_checkpoint_named(config, healthy):
    run_dir = open_run(config)
    last = loop.save(run_dir.checkpoints, config, cluster(), inputs(), guard(), 2) if healthy else None
    error = loop._saved(DivergenceError("grad_norm is nan."), config, run_dir, cluster(), inputs(), guard(), 3)
    diverged = run_dir.path / "diverged" / "step-000003"
    assert checkpoint.find_damage(diverged) is None
    expected = "there is no earlier checkpoint"
    if last:
        expected = (
            f"resume=auto continues from {last} with the same keys, another run from its policy: name=… model=folder "
            f"model.path={last / 'policy'}"
        )
    assert str(error) == (
        f"grad_norm is nan.\n  Report: {run_dir.path / 'report.html'}\n  The state is saved in {diverged}; {expected}."
    )
    assert open_run(replace(config, steps=9)).first_step == (2 if healthy else 0), "a resume must not look at it"


@pytest.mark.parametrize(
    "failed", [CheckpointError("no space left"), LearnerError("no space left"), OSError("no space left")]
)
def test_what_goes_wrong_with_the_state_of_a_diverged_run_is_not_why_it_ends(config, monkeypatch, failed):
    run_dir = open_run(config)

    def refuse(*_: Any) -> None:
        raise failed

    monkeypatch.setattr(loop, "save", refuse)
    (run_dir.path / "report.partial").mkdir()  # so that no report can be written either
    error = loop._saved(DivergenceError("grad_norm is nan."), config, run_dir, cluster(), inputs(), guard(), 3)
    assert str(error).startswith("grad_norm is nan.\n") and "could not be saved (no space left)" in str(error)
    assert "Report: could not be written (" in str(error)


def diverged(*_: Any) -> Any:
    raise DivergenceError("grad_norm is nan.")


@pytest.mark.parametrize("where", ["learn", "enforce"])
def test_a_disk_that_is_full_at_the_step_that_diverges_is_not_why_the_run_ends(config, monkeypatch, where):
    """A file size limit stands for the full disk; of the step all but its rows is left out."""
    run_dir, watched = open_run(config), guard()
    done: dict[str, Any] = {
        "sync": {},
        "check_version": None,
        "reward_metrics": {},
        "to_samples": [],
        "score": [],
        "sample_metrics": {},
    }
    done |= {"learn": [], "update_metrics": {}, "_accuracy": {"accuracy/heldout": 0.5}}
    for name, value in done.items():
        monkeypatch.setattr(loop, name, lambda *_, value=value: value)
    monkeypatch.setattr(loop, "learn", diverged) if where == "learn" else monkeypatch.setattr(
        watched, "enforce", diverged
    )
    for name, verdict in {"leaves_out_timeouts": False, "trusts": True, "look": {"tokens": 1.0}}.items():
        monkeypatch.setattr(watched, name, lambda *_, verdict=verdict: verdict)
    scored = SimpleNamespace(values=[], timed_out=[])
    rewarder: Any = SimpleNamespace(score=lambda *_: scored)
    here, freed = cluster(), list[bool]()
    here.sampler = SimpleNamespace(generate=lambda *_: [], restarted=0, sleep=lambda: None)
    here.learner.make_room = lambda: freed.append(True)
    sleeps, config = where == "enforce", replace(config, logging=LoggingConfig(wandb="disabled", progress=False))
    if sleeps:
        object.__setattr__(config.rollout, "sleep", True)  # which a run on a CPU may not ask for
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with (
            pytest.raises(DivergenceError, match="grad_norm is nan.\n.*\n.*could not be saved"),
            Metrics.open(run_dir.path, config) as metrics,
        ):
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
            loop.train(config, run_dir, inputs(), here, rewarder, metrics, watched)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert freed == [True] * sleeps, "where engines sleep beside it, the learner gives its memory back"


def test_a_run_that_goes_on_has_no_summary_until_it_ends_again(config, monkeypatch):
    """Else the old one would be taken for what a run that then broke came to."""
    run_dir = open_run(config)
    (run_dir.path / "summary.json").write_text('{"steps": 2}')
    monkeypatch.setattr(loop, "prepare", lambda _: inputs())
    monkeypatch.setattr(loop.Cluster, "open", lambda *_: nullcontext(cluster()))
    monkeypatch.setattr(loop, "train", diverged)
    with pytest.raises(DivergenceError):
        loop.run(replace(config, logging=LoggingConfig(wandb="disabled", progress=False)))
    assert not (run_dir.path / "summary.json").exists()


def test_a_stopped_run_may_continue_with_other_limits(small, tmp_path):
    """As the guard's own message advises."""
    loop.save(open_run(small(f"out={tmp_path}", "resume=auto")).checkpoints, small(), cluster(), inputs(), guard(), 2)
    changed = small(f"out={tmp_path}", "resume=auto", "guard.stop.mismatch=9", "sync.canary_tolerance=0.5")
    assert open_run(changed).first_step == 2
