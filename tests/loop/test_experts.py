"""A pocket Qwen3-MoE with packed experts through whole runs, in this process."""

from pathlib import Path

import pytest

from qarl import checkpoint, jsonl, loop

EXPERTS = ("model.pocket.experts=4", "model.pocket.steps=0", "steps=2", "algorithm.mini_batches=1", "resume=auto")


@pytest.fixture
def run(small, tmp_path):
    def start(*overrides: str) -> tuple[Path, list[dict]]:
        config = small(*EXPERTS, f"out={tmp_path}", *overrides)
        loop.run(config)
        folder = tmp_path / config.name
        return folder, jsonl.read(folder / "metrics.jsonl")

    return start


def test_experts_at_four_bits_with_the_torch_engine_and_a_finished_run_is_not_run_again(run, capsys):
    overrides = ("rollout.engine=torch", "rollout.format=w4a16_g32")
    folder, rows = run(*overrides)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["mismatch/mean_abs"] < 1e-3 and row["sync/canary"] < 1e-3 for row in rows[:2])
    found = checkpoint.newest(folder / "checkpoints")
    assert found is not None and found.step == 2

    _, again = run(*overrides)
    assert "resumed from" in capsys.readouterr().err
    accuracy = [[row.get("accuracy/heldout") for row in each] for each in (rows, again)]
    assert accuracy[0] == accuracy[1] and again[:2] == rows[:2]


def test_experts_at_eight_bits_in_bfloat16_with_the_torch_engine(run):
    """Routers' weights are float32 on both sides: rounded on one of them, two layers are 0.02 nats a token apart."""
    settings = ("rollout.engine=torch", "rollout.format=w8a8_fp8", "model.dtype=bfloat16", "learner.zero=1")
    _, rows = run(*settings, "model.pocket.layers=2", "steps=1")
    assert (
        rows[0]["sync/canary"] < 1e-6
    )  # of whole sequences on both sides; a decoded token's bfloat16 products sum otherwise


@pytest.mark.slow
def test_experts_in_floats_with_vllm(run):
    _, rows = run("rollout.engine=vllm", "rollout.format=bf16")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["mismatch/mean_abs"] < 1e-3 and row["sync/canary"] < 1e-3 for row in rows[:2])
