"""The one sink of a run's numbers: `metrics.jsonl` always, W&B beside it, and the progress display.

`METRICS` is the list of everything that can be logged; another name is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from qarl.config import RunConfig
from qarl.jsonl import StepLog
from qarl.progress import ProgressDisplay
from qarl.records import Prompt, Sample
from qarl.wandb_run import WandbRun


class Metric(NamedTuple):
    unit: str
    meaning: str
    show: str = ".3g"
    """Format specification for people."""


METRICS = {
    "reward/mean": Metric("reward", "mean over the responses of the step", ".3f"),
    "reward/std": Metric("reward", "standard deviation over the responses of the step", ".3f"),
    "reward/min": Metric("reward", "lowest of the step", ".3f"),
    "reward/max": Metric("reward", "highest of the step", ".3f"),
    "reward/flat_groups": Metric(
        "share", "groups whose responses, those left out aside, got the same reward: nothing to learn from", ".1%"
    ),
    "reward/timeouts": Metric("responses", "scored 0 because the reward did not answer in time", ".0f"),
    "reward/timeout_share": Metric("share", "of the responses of the step", ".1%"),
    "reward/crashes": Metric("responses", "scored 0 because the reward's process died, or its scorer raised", ".0f"),
    "accuracy/heldout": Metric(
        "share", "responses to held-out prompts that get the full reward, sampled at the run's format", ".1%"
    ),
    "accuracy/unscored": Metric(
        "responses", "to held-out prompts, scored 0 because the scorer did not answer in time, ended or raised", ".0f"
    ),
    "length/mean": Metric("tokens", "mean response", ".1f"),
    "length/max": Metric("tokens", "longest response", ".0f"),
    "length/truncated": Metric("share", "responses cut off at rollout.sampling.max_tokens", ".1%"),
    "mismatch/mean_abs": Metric(
        "nats a token", "mean |learner - sampler| log-prob of the tokens that were sampled", ".2e"
    ),
    "mismatch/max_abs": Metric("nats", "largest |learner - sampler| log-prob of a token", ".2e"),
    "mismatch/k1": Metric("nats a token", "KL(sampler || learner), unbiased estimate; may be negative", ".2e"),
    "mismatch/k3": Metric("nats a token", "KL(sampler || learner), low-variance estimate, never negative", ".2e"),
    "mismatch/chi2": Metric("1", "chi-squared divergence: mean squared importance weight minus 1", ".2e"),
    "mismatch/ess_token": Metric("share", "tokens left effective by importance weights of tokens", ".2%"),
    "mismatch/ess_sequence": Metric(
        "share", "responses left effective by importance weights of whole responses", ".1%"
    ),
    "mismatch/pearson": Metric("1", "correlation of the two sides' probabilities", ".5f"),
    "mismatch/ratio_max": Metric("ratio", "largest importance weight of a token, learner over sampler", ".3f"),
    "mismatch/tokens": Metric("tokens", "compared", ",.0f"),
    "mismatch/dropped_tokens": Metric("tokens", "left out: a log-prob of either side was not finite", ".0f"),
    "mismatch/dropped_share": Metric("share", "of the response tokens, those left out", ".1%"),
    "clip/positive_high": Metric("share", "of units with A > 0: ratio above its bound, no gradient", ".1%"),
    "clip/negative_low": Metric("share", "of units with A < 0: ratio below its bound, no gradient", ".1%"),
    "clip/negative_high": Metric("share", "of units with A < 0: ratio above its bound, no gradient", ".1%"),
    "clip/mismatch_high": Metric("share", "of units: mismatch weight above the correction's cap", ".1%"),
    "clip/mismatch_low": Metric("share", "of units: mismatch weight below the correction's floor", ".1%"),
    "objective/loss": Metric("1", "what was minimised, penalties included", ".3e"),
    "objective/ratio_mean": Metric("ratio", "mean of current over published learner before clipping", ".5f"),
    "objective/ratio_max": Metric("ratio", "largest of current over published learner before clipping", ".3f"),
    "objective/kl": Metric("nats a token", "KL to the reference policy; 0 without one", ".2e"),
    "objective/kl_step": Metric(
        "nats a token", "KL(published || current learner), the largest that an update of the step began with", ".2e"
    ),
    "objective/dropped_sequences": Metric("responses", "left out: empty, or with a non-finite log-prob", ".0f"),
    "error_tokens/repetition_rate": Metric(
        "share", "tokens inside loops of repeated n-grams, mean over responses", ".1%"
    ),
    "error_tokens/garbling_rate": Metric(
        "share", "characters damaged or in a salad of scripts, mean over responses", ".1%"
    ),
    "error_tokens/share": Metric("share", "responses of which more than half is loops, or is garbled", ".1%"),
    "error_tokens/ratio": Metric("ratio", "mean of current over published learner, of error responses", ".5f"),
    "error_tokens/rest_ratio": Metric("ratio", "the same of the other responses", ".5f"),
    "error_tokens/negative": Metric("share", "of units of error responses: A < 0", ".1%"),
    "error_tokens/rest_negative": Metric("share", "of units of the other responses: A < 0", ".1%"),
    "error_tokens/clip_positive_high": Metric(
        "share", "of units of error responses: clipped, A > 0, ratio high", ".1%"
    ),
    "error_tokens/rest_clip_positive_high": Metric("share", "the same of the other responses", ".1%"),
    "error_tokens/clip_negative_low": Metric("share", "of units of error responses: clipped, A < 0, ratio low", ".1%"),
    "error_tokens/rest_clip_negative_low": Metric("share", "the same of the other responses", ".1%"),
    "error_tokens/clip_negative_high": Metric(
        "share", "of units of error responses: clipped, A < 0, ratio high", ".1%"
    ),
    "error_tokens/rest_clip_negative_high": Metric("share", "the same of the other responses", ".1%"),
    "error_tokens/gradient": Metric(
        "share", "of the policy term's gradient at the logits (L1 norm) that error responses have", ".1%"
    ),
    "entropy": Metric("nats a token", "of the learner's distribution at response tokens", ".3f"),
    "grad_norm": Metric("1", "largest of the step's gradient norms, before clipping", ".3g"),
    "lr": Metric("1", "learning rate of the step's last update", ".2e"),
    "tokens": Metric("tokens", "sampled in the step", ",.0f"),
    "tokens_per_s": Metric("tokens/s", "sampled tokens over the time of the whole step", ",.0f"),
    "time/step_s": Metric("s", "the whole step; what is written after it counts to the next", ".2f"),
    "time/publish_s": Metric("s", "quantize, transfer, refill, prove", ".2f"),
    "time/sample_s": Metric("s", "the engine writes responses, then sleeps where it is to", ".2f"),
    "time/reward_s": Metric("s", "responses are scored and get advantages, error tokens are found", ".2f"),
    "time/score_s": Metric(
        "s", "old log-probs: packing, the aligned forward of the published learner, metrics of the samples", ".2f"
    ),
    "time/learn_s": Metric("s", "packing, all forwards, backwards and optimizer steps", ".2f"),
    "time/log_s": Metric("s", "metrics and samples of the step before are written", ".2f"),
    "time/checkpoint_s": Metric("s", "state is saved after the step before", ".2f"),
    "time/evaluate_s": Metric("s", "held-out prompts are answered and scored", ".2f"),
    "time/other_s": Metric(
        "s", "the rest of the step: metrics of the updates, limits of the guard, bookkeeping", ".2f"
    ),
    "learn/forward_s": Metric("s", "forwards of all updates of the step", ".2f"),
    "learn/backward_s": Metric("s", "backwards of all updates of the step", ".2f"),
    "learn/optimizer_s": Metric("s", "optimizer steps", ".2f"),
    "sync/gather_s": Metric("s", "masters are gathered from the ranks", ".3f"),
    "sync/quantize_s": Metric("s", "codes and scales are computed", ".3f"),
    "sync/pack_s": Metric("s", "codes become bytes with checksums", ".3f"),
    "sync/transfer_s": Metric("s", "bytes travel to the engine; over lines: the learner waits for buffers", ".3f"),
    "sync/wait_s": Metric("s", "the engine waits for what it is to load", ".3f"),
    "sync/wake_s": Metric("s", "an engine that slept gets its memory back", ".3f"),
    "sync/load_s": Metric("s", "the engine takes them over", ".3f"),
    "sync/canary_s": Metric("s", "the engine scores the canaries", ".3f"),
    "sync/verify_s": Metric("s", "checksums and tiles are compared", ".3f"),
    "sync/total_s": Metric("s", "the whole sync, proof included; stages of learner and engine may overlap", ".3f"),
    "sync/gb": Metric("GB", "bytes that travelled, 1e9 of them", ".3f"),
    "sync/tile_error": Metric("share", "largest |served - published| weight, over the largest of its columns", ".2e"),
    "sync/canary": Metric("nats a token", "mean |engine - learner| log-prob of the canaries", ".2e"),
    "guard/warnings": Metric("limits", "of guard.warn that the step is beyond", ".0f"),
    "guard/corrections": Metric("limits", "of guard.correct that the step was beyond and corrected for", ".0f"),
    "guard/left_out": Metric("responses", "timed out, and left out of their groups instead of counted as wrong", ".0f"),
    "guard/skipped_updates": Metric("updates", "mini-batches that were not learnt from", ".0f"),
    "guard/read_back": Metric("1", "1: the sync compared every quantized tensor, because of the step before", ".0f"),
    "guard/entropy_drift": Metric(
        "factor", "entropy over that of the run's first step, or the inverse: above 1", ".2f"
    ),
    "engine/restarts": Metric("restarts", "of a dead engine, since the run began", ".0f"),
}
"""Name -> unit, meaning, how it is shown. A share lies between 0 and 1."""

STAGES = tuple(name for name in METRICS if name.startswith("time/") and name != "time/step_s")
"""What the seconds of a step are divided into."""

SAMPLES_A_STEP = 3
SAMPLE_CHARS = 4000


def show(name: str, value: float) -> str:
    """As people read it, without unit: `61.7%`, `1,234`."""
    return format(value, METRICS[name].show)


class Metrics:
    """Open it with `with Metrics.open(...)`: leaving ends the display and the W&B run."""

    def __init__(self, run_dir: Path, config: RunConfig, first_step: int, console: Console) -> None:
        self._rows = StepLog(run_dir / "metrics.jsonl", first_step)
        self._samples = StepLog(run_dir / "samples.jsonl", first_step)
        self._wandb = WandbRun(run_dir, config, console)
        self._display = ProgressDisplay(config.steps, first_step, console) if config.logging.progress else None
        self._next = first_step

    @classmethod
    def open(cls, run_dir: Path, config: RunConfig, first_step: int = 0, console: Console | None = None) -> Metrics:
        """`first_step`: the first that will be logged, as many as lie behind. Above 0, the run in `run_dir` is
        continued; its W&B run is continued whenever the folder has one.
        """
        run_dir.mkdir(parents=True, exist_ok=True)
        return cls(run_dir, config, first_step, console or Console(stderr=True))

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._display:
            self._display.close()
        try:
            self._rows.close()
            self._samples.close()
        except OSError:
            if kind is None:
                raise  # else the disk is full, and not why the run ends
        finally:
            self._wandb.finish(failed=kind is not None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Once a step, in order. Every name is in `METRICS`; values may be NaN or infinite."""
        unknown = sorted(set(values) - set(METRICS))
        assert not unknown, f"not in qarl.metrics.METRICS: {unknown}"
        assert step >= self._next, f"step {step} is logged after step {self._next - 1}"
        self._next = step + 1
        row = {name: float(value) for name, value in values.items()}
        self._rows.append(step, row)
        self._wandb.log(step, row)
        if self._display:
            self._display.update(step + 1, facts(row))

    def log_samples(self, step: int, samples: Sequence[Sample], prompts: Mapping[int, Prompt]) -> None:
        """One response of each of the first three prompts of a step, for the report."""
        first = {sample.completion.prompt: sample for sample in reversed(samples)}
        rows = []
        for prompt_id in list(dict.fromkeys(s.completion.prompt for s in samples))[:SAMPLES_A_STEP]:
            sample, prompt = first[prompt_id], prompts[prompt_id]
            text = {"prompt": prompt.text, "response": sample.completion.text, "answer": prompt.answer}
            about = {
                "prompt_id": prompt.id,
                "reward": float(sample.reward),
                "tokens": len(sample.completion.tokens),
                "finish": sample.completion.finish,
                "repetition": sample.repetition,
                "garbling": sample.garbling,
            }
            rows.append({name: _ends(value) for name, value in text.items()} | about)
            self._samples.append(step, rows[-1])
        self._wandb.log_samples(step, rows)


def facts(row: Mapping[str, float]) -> str:
    """What the progress display says of a step."""
    shown = {"reward/mean": "reward {}", "accuracy/heldout": "held-out {}", "mismatch/mean_abs": "mismatch {}"}
    shown |= {"tokens_per_s": "{} tokens/s"}
    return " · ".join(text.format(show(name, row[name])) for name, text in shown.items() if name in row)


def _ends(text: str) -> str:
    """The start and the end of a long text: loops at the end are what one looks for."""
    half = SAMPLE_CHARS // 2
    return (
        text if len(text) <= SAMPLE_CHARS else f"{text[:half]}\n[… {len(text) - 2 * half} characters …]\n{text[-half:]}"
    )
