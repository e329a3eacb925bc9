"""One run: publish the policy in low bits, sample with it, learn with its own arithmetic, and again.

Version `step` of the weights writes the responses of step `step`. Held-out accuracy logged with a step is that of its version,
so the last row, after the last update, holds an accuracy and no rollout.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from qarl import checkpoint
from qarl.cluster import Cluster, LearnerGroup
from qarl.config import RunConfig
from qarl.errors import CheckpointError, DivergenceError
from qarl.evaluation import evaluate
from qarl.guard import Guard
from qarl.measure import Stopwatch, reward_metrics, sample_metrics, update_metrics
from qarl.metrics import Metrics
from qarl.prepare import Inputs, prepare, say
from qarl.records import Prompt, Sample, Sampling, UpdateStats
from qarl.report import write_report
from qarl.rewards import Rewarder
from qarl.rundir import RunDir, check_resume, open_run, owned
from qarl.samples import check_version, deal, score, to_samples
from qarl.seeds import completion_seeds, mini_batch_order
from qarl.summary import conclude
from qarl.sync import sync


def run(config: RunConfig) -> None:
    """Train until `config.steps`, or raise; `resume=auto` continues from the newest checkpoint."""
    started = time.perf_counter()
    check_resume(config)
    inputs = prepare(config)
    with owned(config):
        run_dir = open_run(config)  # only now: a mistake in data or model moves no old run aside
        with Rewarder(config.reward) as rewarder, Cluster.open(config, inputs.model) as cluster:
            standing = cluster.learner.standing
            say(f"{config.rollout.format}: {standing.coverage}; learner: {standing.arithmetic}")
            guard = Guard(config.guard, say)
            restore(run_dir, cluster, inputs, guard)  # before the metrics of steps to be done again are moved aside
            (run_dir.path / "summary.json").unlink(missing_ok=True)  # of an end that is one no more: the run goes on
            with Metrics.open(run_dir.path, config, run_dir.first_step) as metrics:
                train(config, run_dir, inputs, cluster, rewarder, metrics, guard)
        closing = conclude(config, run_dir.path, time.perf_counter() - started)
        write_report(run_dir.path)
    print(closing)


def train(
    config: RunConfig,
    run_dir: RunDir,
    inputs: Inputs,
    cluster: Cluster,
    rewarder: Rewarder,
    metrics: Metrics,
    guard: Guard,
) -> None:
    """The algorithm."""
    learner, sampler, prompts = cluster.learner, cluster.sampler, inputs.train
    algorithm, sampling = config.algorithm, config.rollout.sampling
    watch = Stopwatch()

    for step in range(run_dir.first_step, config.steps + 1):
        with watch("publish"):
            row = sync(config, learner, sampler, step, inputs.canaries, guard.reads_back)
        if _due(config.evaluation.every, step) or step in (0, config.steps):
            with watch("evaluate"):
                row |= _accuracy(config, cluster, rewarder, inputs)
        if step == config.steps:
            metrics.log(step, row | watch.lap())
            return

        with watch("sample"):
            asked = prompts.take(algorithm.prompts)
            seeds = completion_seeds(config.seed, "rollout", step, algorithm.prompts, algorithm.group)
            completions = sampler.generate(asked, sampling, seeds)
            if config.rollout.sleep:
                sampler.sleep()
        check_version(completions, step)
        with watch("reward"):
            rewards = rewarder.score([c.text for c in completions], [p for p in asked for _ in range(algorithm.group)])
            row |= reward_metrics(rewards)
            left_out = rewards.timed_out if guard.leaves_out_timeouts(step, row) else None
            samples = to_samples(asked, completions, rewards.values, algorithm.advantage, left_out)
        with watch("score"):
            samples = score(learner, samples)
            row |= sample_metrics(samples, algorithm.group)
        with watch("learn"):
            try:
                updates = learn(config, learner, samples, guard, step) if guard.trusts(step, row) else []
            except DivergenceError as error:
                with suppress(OSError):  # a full disk is not why the run ends, and is told of with the state
                    _log(metrics, step, row, asked, samples)  # of its updates nothing: it is the step that tells why
                raise _saved(error, config, run_dir, cluster, inputs, guard, step) from error

        if config.rollout.sleep:
            learner.make_room()
        row |= update_metrics(updates)
        row |= {"guard/skipped_updates": algorithm.mini_batches - len(updates), "engine/restarts": sampler.restarted}
        row |= guard.look(step, row) | watch.lap()
        row["tokens_per_s"] = row["tokens"] / row["time/step_s"]
        try:
            guard.enforce()
        except DivergenceError as error:
            with suppress(OSError):
                _log(metrics, step, row, asked, samples)
            raise _saved(error, config, run_dir, cluster, inputs, guard, step + 1) from error
        with watch("log"):
            _log(metrics, step, row, asked, samples)
        if _due(config.checkpoint.every, step + 1) or step + 1 == config.steps:
            with watch("checkpoint"):
                save(run_dir.checkpoints, config, cluster, inputs, guard, step + 1, config.checkpoint.keep)


def _log(
    metrics: Metrics, step: int, row: dict[str, float], asked: Sequence[Prompt], samples: Sequence[Sample]
) -> None:
    metrics.log(step, row)
    metrics.log_samples(step, samples, {prompt.id: prompt for prompt in asked})


def learn(
    config: RunConfig, learner: LearnerGroup, samples: Sequence[Sample], guard: Guard, step: int
) -> list[UpdateStats]:
    """An optimizer step on each mini-batch of a rollout, as long as the guard lets them go on. Raises `DivergenceError`."""
    order = mini_batch_order(config.seed, step, len(samples))
    parts = deal(samples, order, config.algorithm.mini_batches, learner.ranks, learner.tokens)
    updates: list[UpdateStats] = []
    for part in parts:
        updates.append(learner.update(part))
        if part is not parts[-1] and not guard.goes_on(step, updates[-1]):
            break
    return updates


def restore(run_dir: RunDir, cluster: Cluster, inputs: Inputs, guard: Guard) -> None:
    """Learner, prompt stream and guard as they were; raises `CheckpointError` where the checkpoint is of another contract, or
    lacks what a run continues from."""
    if run_dir.resumed is None:
        return
    folder, state = run_dir.resumed.folder, run_dir.resumed.state
    missing = [key for key in ("contract_hash", "prompts", "guard") if key not in state]
    missing += [f"guard.{key}" for key in guard.state() if "guard" in state and key not in state["guard"]]
    if missing:
        raise CheckpointError(
            f"{folder / 'state.json'}: {', '.join(missing)} missing: another version of QaRL saved it, and no run "
            f"can continue from it. Start a new one from its policy: name=… model=folder model.path={folder / 'policy'}"
        )
    saved, mine = state["contract_hash"], cluster.learner.standing.contract_hash
    if saved != mine:
        raise CheckpointError(f"{folder} was made under contract {saved}, this run's is {mine}")
    cluster.learner.load(folder)
    inputs.train.restore(state["prompts"])
    guard.restore(state["guard"])
    say(f"resumed from {folder}")


def save(
    root: Path,
    config: RunConfig,
    cluster: Cluster,
    inputs: Inputs,
    guard: Guard,
    step: int,
    keep: int | None = None,
) -> Path:
    """A checkpoint after `step` steps, complete or not there. `keep`: how many there may be; `None`: all."""
    state = {
        "step": step,
        "contract_hash": cluster.learner.standing.contract_hash,
        "format": config.rollout.format,
        "prompts": inputs.train.state(),
        "guard": guard.state(),
    }
    return checkpoint.save(root, state, cluster.learner.save, keep)


def _saved(
    error: DivergenceError,
    config: RunConfig,
    run_dir: RunDir,
    cluster: Cluster,
    inputs: Inputs,
    guard: Guard,
    step: int,
) -> DivergenceError:
    """The error, once the state it happened in is on disk, apart from the checkpoints that a resume looks at, and a report
    that shows how it came to it. What goes wrong with either is not why the run ends: it is told with it."""
    try:
        report = str(write_report(run_dir.path))
    except Exception as failed:
        report = f"could not be written ({failed})"
    try:
        state = f"is saved in {save(run_dir.path / 'diverged', config, cluster, inputs, guard, step)}"
    except Exception as failed:
        state = f"could not be saved ({failed})"
    last = checkpoint.newest(run_dir.checkpoints)
    healthy = (
        f"resume=auto continues from {last.folder} with the same keys, another run from its policy: name=… model=folder "
        f"model.path={last.folder / 'policy'}"
        if last
        else "there is no earlier checkpoint"
    )
    return DivergenceError(f"{error}\n  Report: {report}\n  The state {state}; {healthy}.")


def _accuracy(config: RunConfig, cluster: Cluster, rewarder: Rewarder, inputs: Inputs) -> dict[str, float]:
    settings = config.evaluation
    sampling = Sampling(
        temperature=settings.temperature,
        max_tokens=config.rollout.sampling.max_tokens,
        stop=config.rollout.sampling.stop,
    )
    found = evaluate(cluster.sampler, rewarder, inputs.heldout, n=settings.n, sampling=sampling, seed=config.seed)
    return {"accuracy/heldout": found.accuracy, "accuracy/unscored": found.unscored}


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
