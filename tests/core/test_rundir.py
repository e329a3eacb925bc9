"""What happens to a run folder that is there already."""

import subprocess
import sys
from dataclasses import replace

import pytest

from qarl import checkpoint
from qarl.config import GuardConfig, LearnerConfig, LoggingConfig, OptimizerConfig, RolloutConfig, RunConfig, StopLimits
from qarl.errors import CheckpointError, ConfigError
from qarl.rundir import check_resume, load_config, open_run, owned


def config(tmp_path, **changes) -> RunConfig:
    return replace(RunConfig(name="r", out=str(tmp_path)), **changes)


def save(run_dir, step):
    checkpoint.save(run_dir.checkpoints, {"step": step}, lambda folder: (folder / "policy").touch(), 2)


def test_a_new_run_starts_at_zero_and_keeps_its_configuration(tmp_path):
    run = open_run(config(tmp_path, seed=7))
    assert run.resumed is None and run.first_step == 0
    assert load_config(run.path) == config(tmp_path, seed=7)


def test_never_moves_an_old_run_aside_and_loses_nothing(tmp_path, capsys):
    first = open_run(config(tmp_path))
    (first.path / "metrics.jsonl").write_text("old\n")
    open_run(config(tmp_path))
    third = open_run(config(tmp_path))
    assert (tmp_path / "r.old1" / "metrics.jsonl").read_text() == "old\n" and (tmp_path / "r.old2").is_dir()
    assert not (third.path / "metrics.jsonl").exists() and "r.old2" in capsys.readouterr().out


def test_a_folder_that_a_living_process_runs_in_is_refused(tmp_path):
    """Else one would drop the other's checkpoints; once that process is gone, however it went, the folder is free."""
    code = "import sys, time\nfrom qarl.rundir import owned\nfrom qarl.config import RunConfig\n"
    code += "with owned(RunConfig(name='r', out=sys.argv[1])):\n    print('mine', flush=True)\n    time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "mine\n"
        with pytest.raises(ConfigError, match=r"name: .*/r is being run by another process"), owned(config(tmp_path)):
            pass
        other.kill()
    with owned(config(tmp_path)), owned(config(tmp_path, name="another")):
        pass


def test_what_goes_wrong_in_a_run_is_raised_as_it_is(tmp_path):
    """An error of a file that is not the lock must not bear the lock's name."""
    full = OSError(28, "No space left on device", "/data/model.safetensors")
    with pytest.raises(OSError) as raised, owned(config(tmp_path)):
        raise full
    assert raised.value is full and full.filename == "/data/model.safetensors"


def test_auto_does_not_start_over_where_no_checkpoint_is_whole(tmp_path):
    """A disk that answers for none of them would cost all: the first save drops later steps."""
    run = open_run(config(tmp_path, resume="auto"))
    save(run, 5), save(run, 10)
    for folder in run.checkpoints.iterdir():
        (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint there is whole"):
        open_run(config(tmp_path, resume="auto"))
    assert sorted(folder.name for folder in run.checkpoints.iterdir()) == ["step-000005", "step-000010"]
    assert open_run(config(tmp_path, resume="never")).first_step == 0


def test_auto_takes_what_changes_no_number(tmp_path):
    save(open_run(config(tmp_path, resume="auto")), 5)
    less = config(tmp_path, resume="auto", rollout=RolloutConfig(gpu_memory=0.3, kv_cache_gb=2.0))
    assert open_run(less).first_step == 5


def test_auto_continues_from_the_newest_checkpoint(tmp_path):
    run = open_run(config(tmp_path, resume="auto"))
    assert run.resumed is None
    save(run, 5), save(run, 10)
    again = open_run(config(tmp_path, resume="auto", steps=500, logging=LoggingConfig(wandb="disabled")))
    assert again.first_step == 10


def test_auto_refuses_another_configuration_and_names_what_differs(tmp_path):
    run = open_run(config(tmp_path, resume="auto"))
    save(run, 5)
    with pytest.raises(
        ConfigError, match="resume: .*\n  rollout.format: was 'w4a16', now 'bf16'\n  seed: was 0, now 3"
    ):
        open_run(config(tmp_path, resume="auto", seed=3, rollout=RolloutConfig(format="bf16")))
    assert load_config(run.path).seed == 0


def test_auto_takes_other_limits_of_the_guard(tmp_path):
    save(open_run(config(tmp_path, resume="auto")), 5)
    assert open_run(config(tmp_path, resume="auto", guard=GuardConfig(stop=StopLimits(mismatch=2.0)))).first_step == 5


def test_auto_refuses_other_steps_where_the_learning_rate_decays_towards_the_last(tmp_path):
    decaying = LearnerConfig(optimizer=OptimizerConfig(schedule="cosine"))
    save(open_run(config(tmp_path, resume="auto", learner=decaying)), 5)
    with pytest.raises(ConfigError, match="resume: .*\n  steps: was 100, now 200"):
        open_run(config(tmp_path, resume="auto", learner=decaying, steps=200))


def test_auto_refuses_fewer_steps_than_were_done(tmp_path):
    save(open_run(config(tmp_path, resume="auto")), 5)
    with pytest.raises(ConfigError, match="^steps: 4, but .*step-000005 is already at step 5"):
        open_run(config(tmp_path, resume="auto", steps=4))
    assert load_config(tmp_path / "r").steps == 100


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_check_changes_nothing(tmp_path, resume):
    open_run(config(tmp_path, seed=7))
    changed = config(tmp_path, seed=8, resume=resume)
    if resume == "auto":
        with pytest.raises(ConfigError, match="seed: was 7, now 8"):
            check_resume(changed)
    else:
        check_resume(changed)
    assert [f.name for f in tmp_path.iterdir()] == ["r"] and load_config(tmp_path / "r").seed == 7
