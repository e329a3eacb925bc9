"""The arms of `benchmarks.stability` as data: which objective, correction, format and learner; which model; in which order.

An arm says what `recipe=stability_gpu`, the aligned learner with TBPO on w4a16 rollouts, is to do otherwise. Neighbours differ in
what their names say: format, learner, objective or correction.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qarl.config import PocketConfig

#: Pocket models, by their shape. Widths are multiples of 128, so that groups of w4a16 and Marlin's tiles fit. The warm start ends
#: as soon as the model is right often enough, after `steps` at the latest, towards which its learning
#: rates come down.
DENSE = PocketConfig(
    hidden_size=512,
    intermediate_size=1536,
    layers=8,
    heads=8,
    kv_heads=4,
    head_dim=64,
    init_std=0.02,
    steps=800,
    batch_size=64,
    adam_lr=3e-3,
)
MOE = PocketConfig(
    hidden_size=512,
    intermediate_size=256,
    layers=6,
    heads=8,
    kv_heads=4,
    head_dim=64,
    init_std=0.02,
    experts=16,
    experts_per_token=2,
    steps=800,
    batch_size=64,
    adam_lr=2e-3,
)
TINY = PocketConfig(hidden_size=128, intermediate_size=256, layers=2, context=1024, steps=40, batch_size=16)

#: Real weights, whose shape is their own. On a CPU, after 40 steps of four rows, the loss is 0.15; with 1e-3 and 1e-4 it is 0.33.
#: Whole warm starts were not compared.
SMOLLM2 = PocketConfig(steps=1000, batch_size=32, muon_lr=5e-3, adam_lr=3e-4)

MODELS = {"dense": DENSE, "moe": MOE, "smollm2": SMOLLM2, "tiny": TINY}
"""Name -> what `warm` makes. `tiny` is for `run --smoke`."""

OF_MODEL: dict[str, tuple[str, ...]] = {
    "dense": (),
    "moe": ("sync.canary_tolerance=0.3",),  # of a router in BF16: a near tie may send a token elsewhere
    # Its chat template says more, and it has more to lose.
    "smollm2": (
        "data.max_prompt_tokens=224",
        "model.max_tokens=640",
        "rollout.kv_cache_gb=4",
        "learner.optimizer.lr=1e-5",
        "sync.canary_tolerance=0.3",  # in INT4 its engine differs from itself by 0.06
    ),
    "tiny": (),
}
"""What all arms of a model are given."""

FINER = {"smollm2": {"w4a16": "w4a16_g32"}}
"""Model -> a format -> the one that it takes in its place: 576, its width, is no multiple of 128."""


def taken(model: str, format: str) -> str:
    return FINER.get(model, {}).get(format, format)


SMOKE = (
    *(
        "model.dtype=float32",
        "model.max_tokens=1024",
        "rollout.engine=torch",
        "placement.gpus=0",
        "rollout.kv_cache_gb=0.2",
    ),
    *(
        "learner.zero=0",
        "learner.tokens=2048",
        "steps=2",
        "algorithm.prompts=2",
        "algorithm.group=4",
        "algorithm.mini_batches=2",
    ),
    *("rollout.sampling.max_tokens=64", "evaluation.prompts=4", "evaluation.n=1", "sync.canary_tolerance=0.5"),
)
"""What all runs of `run --smoke` are given: the whole path on a CPU in minutes."""

OBJECTIVES: dict[str, tuple[str, ...]] = {
    "tbpo": (),
    "gspo": ("algorithm.objective.bounds.negative_high=null", "algorithm.objective.correction.kind=none"),
    "dual_clip": (
        "algorithm.objective.ratio=token",
        "algorithm.objective.bounds.positive_high=0.2",
        "algorithm.objective.bounds.negative_low=0.2",
        "algorithm.objective.bounds.negative_high=2.0",
        "algorithm.objective.correction.kind=none",
    ),
}
CORRECTIONS: dict[str, tuple[str, ...]] = {
    "": (),
    "tis": ("algorithm.objective.correction.kind=tis", "algorithm.objective.correction.level=token"),
    "mis": ("algorithm.objective.correction.kind=mis", "algorithm.objective.correction.level=sequence_sum"),
}
"""Weights against the mismatch, cap 2 each. `mis` masks a response by the product of its tokens' ratios; their geometric mean would
reach no cap."""


@dataclass(frozen=True)
class Arm:
    format: str
    learner: str
    """`bf16`: computes unquantized, by transformers' ops; `aligned`: as the engine does."""
    objective: str
    correction: str = ""

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.format, self.learner, self.objective, self.correction) if part)

    @property
    def label(self) -> str:
        """As tables and figures say it."""
        learner = {"bf16": "BF16 learner", "aligned": "aligned"}[self.learner]
        correction = f" + {self.correction.upper()}" if self.correction else ""
        return f"{self.format} rollouts, {learner}, {self.objective.replace('_', '-').upper()}{correction}"

    def overrides(self, format: str) -> tuple[str, ...]:
        """`format`: the arm's, or what its model takes in that one's place."""
        backend = {"bf16": "none", "aligned": "auto"}[self.learner]
        # The objective first: a correction is one of its keys, and hydra takes the last word.
        objective = [*OBJECTIVES[self.objective], *CORRECTIONS[self.correction]]
        last = {word.partition("=")[0]: word for word in objective}
        return (f"rollout.format={format}", f"learner.backend={backend}", *last.values())


TABLE = (
    Arm("bf16", "bf16", "gspo"),
    Arm("w4a16", "bf16", "gspo"),
    Arm("w4a16", "bf16", "gspo", "tis"),
    Arm("w4a16", "bf16", "gspo", "mis"),
    Arm("w4a16", "aligned", "gspo"),
    Arm("w4a16", "aligned", "dual_clip"),
    Arm("w4a16", "aligned", "tbpo"),
)
"""Those of the README's table."""

EIGHT_BITS = tuple(
    Arm(name, learner, objective)
    for name in ("w8a8_int8", "w8a8_fp8")
    for learner, objective in (("bf16", "gspo"), ("aligned", "tbpo"))
)
ARMS = {arm.name: arm for arm in (*TABLE, *EIGHT_BITS)}
BASELINE = TABLE[0].name


@dataclass(frozen=True)
class Job:
    """One run: an arm of a model with a seed."""

    model: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.arm}-seed{self.seed}"

    @property
    def format(self) -> str:
        return taken(self.model, ARMS[self.arm].format)

    def overrides(self, work: Path, extra: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Arguments of `qarl.train`. `work` holds models, data and runs; `extra` is given to every arm, which
        has the last word: a band for ratios of sequences does not reach the arm whose ratios are of tokens."""
        return (
            "recipe=stability_gpu",
            f"out={work / 'runs'}",
            f"name={self.name}",
            f"seed={self.seed}",
            f"model.path={work / 'models' / self.model}",
            f"data.train.source={work / 'data' / 'train.jsonl'}",
            f"data.heldout.source={work / 'data' / 'heldout.jsonl'}",
            *OF_MODEL[self.model],
            *extra,
            *ARMS[self.arm].overrides(self.format),
        )


def schedule(models: list[str], arms: list[str], seeds: list[int]) -> list[Job]:
    """Whole seeds first, the table's arms before the others: what a limit of time cuts off is what matters least."""
    groups = [[a for a in arms if ARMS[a] in TABLE], [a for a in arms if ARMS[a] not in TABLE]]
    jobs = [Job(model, arm, seed) for model in models for group in groups for seed in seeds for arm in group]
    return list(dict.fromkeys(jobs))  # one that is named twice would run twice at a time, in one folder
