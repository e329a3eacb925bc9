"""What a run that fails at its start leaves as it was."""

import ast
import inspect
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from qarl import checkpoint, loop
from qarl.errors import CheckpointError, ConfigError
from qarl.guard import Guard
from qarl.metrics import METRICS
from qarl.rundir import open_run


@pytest.fixture
def config(composed, tmp_path):
    return lambda *overrides: composed(
        "recipe=quickstart", f"out={tmp_path}", "logging.wandb=disabled", "reward.workers=1", *overrides
    )


def test_a_mistake_in_the_data_moves_no_old_run_aside(config, tmp_path):
    open_run(config())
    with pytest.raises(ConfigError, match="data.heldout.source: no such file"):
        loop.run(config("data.heldout.source=missing.jsonl"))
    assert [f.name for f in tmp_path.iterdir()] == ["quickstart"]


def test_a_checkpoint_that_is_refused_leaves_the_rows_behind_it(config, monkeypatch):
    """Those of steps to be done again move aside only once the learner has taken the checkpoint."""
    run_dir = open_run(config("resume=auto"))
    state = {"step": 1, "contract_hash": "aaaa", "prompts": {}, "guard": Guard(config().guard, print).state()}
    checkpoint.save(run_dir.checkpoints, state, lambda folder: (folder / "policy").touch(), 2)
    rows = '{"step": 0}\n{"step": 1}\n'
    (run_dir.path / "metrics.jsonl").write_text(rows)
    standing = SimpleNamespace(contract_hash="bbbb", coverage="all", arithmetic="products emulated")
    cluster = SimpleNamespace(learner=SimpleNamespace(standing=standing))
    monkeypatch.setattr(loop, "prepare", lambda _: SimpleNamespace(model="folder"))
    monkeypatch.setattr(loop.Cluster, "open", lambda *_: nullcontext(cluster))
    with pytest.raises(CheckpointError, match="made under contract aaaa, this run's is bbbb"):
        loop.run(config("resume=auto"))
    assert (run_dir.path / "metrics.jsonl").read_text() == rows


WORK = {
    "advantages": {"to_samples"},
    "error tokens": {"to_samples"},
    "metrics of the samples": {"sample_metrics"},
    "packing": {"score", "learn"},
}
"""What a description names -> the functions that do it."""


@pytest.mark.parametrize("work", WORK)
def test_a_stage_is_described_by_the_work_that_it_times(work):
    timed = {stage for stage, calls in stages() if WORK[work] & calls}
    described = {name for name, metric in METRICS.items() if name.startswith("time/") and work in metric.meaning}
    assert timed and described == {f"time/{stage}_s" for stage in timed}


def stages():
    """Each `with watch(STAGE)` of the algorithm, and the functions that are called in it."""
    for block in ast.walk(ast.parse(inspect.getsource(loop.train))):
        if not isinstance(block, ast.With):
            continue
        stage = re.fullmatch(r"watch\('(\w+)'\)", ast.unparse(block.items[0].context_expr))
        calls = [node.func for node in ast.walk(block) if isinstance(node, ast.Call)]
        if stage:
            yield stage[1], {function.id for function in calls if isinstance(function, ast.Name)}
