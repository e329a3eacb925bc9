"""The configuration: every key, its default, its meaning and its checks, as one tree of frozen dataclasses.

Two branches stand where they are used: `algorithm.objective` in `qarl/algorithm.py`, `rollout.sampling` in `qarl/records.py`.

Hydra composes YAML into a plain mapping, `qarl.build` makes this tree of it. Defaults live here only. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

from qarl import formats
from qarl.algorithm import Objective, tbpo
from qarl.errors import ConfigError
from qarl.records import Sampling

Backend = Literal["auto", "engine", "fused", "emulated", "none"]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _positive(key: str, value: float) -> None:
    _require(value > 0, f"{key}: must be positive, got {value}")


def _not_negative(key: str, value: float) -> None:
    _require(value >= 0, f"{key}: must not be negative, got {value}")


@dataclass(frozen=True)
class PocketConfig:
    """A tiny Qwen3 made on the spot and warm-started with supervision on short sums; see `trainer/pocket.py`."""

    seed: int = 0
    """Of the weights and of the demonstrations."""
    hidden_size: int = 128
    """Width of the residual stream. This and the next are multiples of 128, so that every format's groups fit."""
    intermediate_size: int = 256
    """Width of the MLP, or of one expert."""
    layers: int = 3
    """Decoder layers."""
    heads: int = 4
    """Attention heads."""
    kv_heads: int = 2
    """Key and value heads."""
    head_dim: int = 32
    """Width of a head."""
    context: int = 512
    """Longest sequence."""
    rope_theta: float = 100.0
    """Base of the rotary embedding: low, since prompts are short and every frequency should tell neighbours apart."""
    init_std: float = 0.06
    """Deviation of the random weights."""
    experts: int = 0
    """Experts a layer; 0 makes a dense Qwen3, more a Qwen3-MoE with packed experts."""
    experts_per_token: int = 2
    """Experts that a token visits."""
    min_terms: int = 6
    """Of a demonstrated sum; as the next two, an argument of reasoning-gym's chain_sum."""
    max_terms: int = 6
    """Of a demonstrated sum."""
    max_digits: int = 1
    """Of a term."""
    template: str = "{metadata[expression]} ="
    """The prompt, over the item's fields; the run's data must use the same."""
    steps: int = 500
    """Supervised steps; 0 leaves random weights."""
    batch_size: int = 32
    """Demonstrations of a step."""
    muon_lr: float = 0.02
    """Peak of the warm start, for linear layers; AdamW alone needs about three times the steps."""
    adam_lr: float = 6e-3
    """Peak of the warm start, for embeddings, head and norms."""
    worked_share: float = 0.42
    """Of the demonstrations, those that show the steps; the others answer at once. Below a half, greedy decoding does too."""

    def __post_init__(self) -> None:
        for name in (
            "hidden_size",
            "intermediate_size",
            "layers",
            "heads",
            "kv_heads",
            "head_dim",
            "context",
            "max_digits",
            "batch_size",
            "muon_lr",
            "adam_lr",
        ):
            _positive(f"model.pocket.{name}", getattr(self, name))
        _not_negative("model.pocket.steps", self.steps)
        _require(
            0 <= self.worked_share <= 1,
            f"model.pocket.worked_share: must be at least 0 and at most 1, got {self.worked_share}",
        )
        _require(
            2 <= self.min_terms <= self.max_terms,
            f"model.pocket.min_terms: must be 2 at least and model.pocket.max_terms = {self.max_terms} at most, got "
            f"{self.min_terms}",
        )
        _require(
            self.heads % self.kv_heads == 0,
            f"model.pocket.heads: {self.heads} is no multiple of model.pocket.kv_heads = {self.kv_heads}",
        )
        _not_negative("model.pocket.experts", self.experts)
        _require(
            self.experts == 0 or 1 <= self.experts_per_token <= self.experts,
            f"model.pocket.experts_per_token: must be at least 1 and at most model.pocket.experts = {self.experts}, "
            f"got {self.experts_per_token}",
        )


@dataclass(frozen=True)
class ModelConfig:
    """Which policy is trained."""

    path: str = ""
    """A folder in Hugging Face layout or a hub name; empty with `pocket` or `gguf`."""
    revision: str | None = None
    """Commit, branch or tag on the hub."""
    gguf: str | None = None
    """A GGUF file, or `package:NAME` for one carried by an installed package; converted once into a cached folder."""
    pocket: PocketConfig | None = None
    """Make a pocket model instead of loading one."""
    architecture: Mapping[str, object] = field(default_factory=dict)
    """The hub model's `config.json`, as far as a plan needs it before the download."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of weights and activations, in learner and engine alike. CPUs without AMX want float32."""
    max_tokens: int = 2048
    """Context: prompt and response together."""

    def __post_init__(self) -> None:
        _positive("model.max_tokens", self.max_tokens)
        given = [k for k, v in {"path": self.path, "gguf": self.gguf, "pocket": self.pocket}.items() if v]
        _require(len(given) == 1, f"model: give exactly one of path, gguf, pocket; got {given or 'none'}")
        _require(
            self.revision is None or bool(self.path),
            f"model.revision: {self.revision!r} is of a hub model, but model.path is empty",
        )


@dataclass(frozen=True)
class FieldsConfig:
    """Which fields of a row mean what. Inside of a field, a path: `messages.1.content` is the content of the second message."""

    prompt: str = "question"
    """The question."""
    answer: str = "answer"
    """The reference answer."""
    extras: tuple[str, ...] = ()
    """Further fields handed to the reward."""


@dataclass(frozen=True)
class DatasetConfig:
    """Where questions come from."""

    source: str = ""
    """`reasoning_gym:TASK`, a `.jsonl` or `.parquet` file, or a hub name."""
    split: str = "train"
    """Split of a hub data set."""
    options: Mapping[str, object] = field(default_factory=dict)
    """A reasoning-gym task's own parameters, or the hub data set's `name`."""
    size: int | None = None
    """Rows to use; `None`: all. Procedural tasks must be given one."""
    seed: int = 0
    """Of a procedural task."""
    fields: FieldsConfig = field(default_factory=FieldsConfig)
    """Field mapping."""
    template: str = "{prompt}"
    """The user's message, over the row's fields and `prompt`."""
    system: str | None = None
    """System message, where the chat template has one."""


@dataclass(frozen=True)
class DataConfig:
    """Prompts to train on, and prompts held out from training."""

    train: DatasetConfig = field(default_factory=DatasetConfig)
    """Rows whose prompt also stands among the held-out ones are left out, and counted."""
    heldout: DatasetConfig = field(default_factory=DatasetConfig)
    """Never trained on."""
    chat: bool = True
    """Apply the tokenizer's chat template."""
    shuffle: bool = True
    """A new order each pass, from `seed`."""
    max_prompt_tokens: int = 1024
    """Longer prompts are treated as `overlong` says."""
    overlong: Literal["error", "drop"] = "error"
    """Refuse the data set, or leave such rows out and count them."""

    def __post_init__(self) -> None:
        _positive("data.max_prompt_tokens", self.max_prompt_tokens)


@dataclass(frozen=True)
class RewardConfig:
    """How a response is scored."""

    kind: Literal["math", "exact", "reasoning_gym"] = "math"
    """`math`: math-verify against the answer; `exact`: the stripped last line; `reasoning_gym`: the task's own scorer."""
    workers: int = 2
    """Killable processes."""
    timeout_s: float = 5.0
    """Of one response; then its worker is killed, the reward is 0 and the timeout is counted."""
    memory_mb: int = 1024
    """Address space a worker may add to what it starts with."""
    max_chars: int = 20_000
    """Of a response that the reward looks at: its end, where answers stand."""

    def __post_init__(self) -> None:
        _positive("reward.workers", self.workers)
        _positive("reward.timeout_s", self.timeout_s)
        _positive("reward.memory_mb", self.memory_mb)
        _positive("reward.max_chars", self.max_chars)


@dataclass(frozen=True)
class RolloutConfig:
    """The sampler."""

    engine: Literal["vllm", "torch"] = "vllm"
    """`torch` runs any format emulated, slowly: for tests, and for formats this machine's vLLM lacks."""
    format: str = "w4a16"
    """A name in `qarl.formats`."""
    sampling: Sampling = field(default_factory=Sampling)
    """Of training rollouts. `top_p` and `top_k` must be off there: the learner scores whole distributions."""
    gpu_memory: float = 0.5
    """Share of a GPU's memory the engine may take."""
    kv_cache_gb: float | None = None
    """KV cache of an engine; `None`: on a GPU what `gpu_memory` leaves, on CPU 1. To be given where other runs share the GPU, whose
    memory vLLM would count as its own."""
    max_sequences: int = 256
    """Sequences decoded at a time."""
    tensor_parallel: int = 1
    """GPUs of one engine, 1 or 2: ranks that hold a part of every layer. The learner sums their products as they do."""
    eager: bool = False
    """No CUDA graphs and no compilation."""
    sleep: bool = False
    """Between sampling and the next sync a colocated engine gives the GPU memory of its weights and KV cache to the learner."""
    replicas: int = 1
    """Engines; prompts are spread over them."""
    restarts: int = 3
    """Times a dead engine is started again before the run gives up."""

    def __post_init__(self) -> None:
        formats.get(self.format)
        _require(0 < self.gpu_memory < 1, f"rollout.gpu_memory: must lie between 0 and 1, got {self.gpu_memory}")
        _positive("rollout.kv_cache_gb", 1.0 if self.kv_cache_gb is None else self.kv_cache_gb)
        for name in ("max_sequences", "replicas"):
            _positive(f"rollout.{name}", getattr(self, name))
        _require(
            self.tensor_parallel in (1, 2),
            f"rollout.tensor_parallel: {self.tensor_parallel} is not one of [1, 2]: sums over more ranks are rounded in an order "
            "that no learner can repeat",
        )
        _require(
            self.tensor_parallel == 1 or self.engine == "vllm",
            f"rollout.tensor_parallel: {self.tensor_parallel} needs rollout.engine=vllm, got {self.engine}",
        )
        _not_negative("rollout.restarts", self.restarts)
        sampling = self.sampling
        _positive("rollout.sampling.max_tokens", sampling.max_tokens)
        _require("" not in sampling.stop, "rollout.sampling.stop: must hold no empty string, which would stop at once")
        _require(
            sampling.temperature > 0,
            f"rollout.sampling.temperature: must be positive to train on, got {sampling.temperature}",
        )
        _require(
            sampling.top_p == 1.0 and sampling.top_k == 0,
            f"rollout.sampling: top_p must be 1 and top_k 0, got {sampling.top_p} and {sampling.top_k}: "
            "truncated sampling gives log-probs of another distribution than the learner's",
        )


@dataclass(frozen=True)
class AlgorithmConfig:
    """What is optimised."""

    prompts: int = 32
    """Prompts of a step."""
    group: int = 8
    """Completions of a prompt."""
    mini_batches: int = 4
    """Optimizer steps made of one rollout; with one, ratios are 1 and no band is ever met."""
    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """See `qarl.advantages`."""
    objective: Objective = field(default_factory=tbpo)
    """Ratio, bounds, correction, normaliser; `algorithm=grpo|dapo|dual_clip|gspo|tbpo` are settings of it."""

    def __post_init__(self) -> None:
        for name in ("prompts", "mini_batches"):
            _positive(f"algorithm.{name}", getattr(self, name))
        _require(
            self.group > 1,
            f"algorithm.group: must be at least 2, got {self.group}: advantages compare the completions of one prompt",
        )
        total = self.prompts * self.group
        _require(
            total % self.mini_batches == 0,
            f"algorithm.mini_batches: {self.mini_batches} does not divide prompts x group = "
            f"{self.prompts} x {self.group} = {total}",
        )
        _require(
            self.objective.kl_coefficient == 0,
            f"algorithm.objective.kl_coefficient: must be 0, got {self.objective.kl_coefficient}: no reference policy is kept",
        )
        _require(
            self.objective.kl_estimator == "k3",
            f"algorithm.objective.kl_estimator: {self.objective.kl_estimator!r} would not be read, kl_coefficient is 0",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """How gradients become weights."""

    name: Literal["adamw", "muon", "adamw_8bit"] = "adamw"
    """`muon`: matrices by Muon, the rest by AdamW; `adamw_8bit`: bitsandbytes."""
    lr: float = 1e-6
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    weight_decay: float = 0.0
    """Decoupled."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up; `linear` and `cosine` end at `min_lr_ratio` of the peak with the run's last step, unless
    `guard.correct` skipped updates."""
    warmup: int = 0
    """Optimizer steps of linear warm-up."""
    min_lr_ratio: float = 0.1
    """Where a decaying schedule ends."""
    grad_clip: float = 1.0
    """Largest gradient norm."""
    muon_momentum: float = 0.95
    """Of Muon."""

    def __post_init__(self) -> None:
        _positive("learner.optimizer.lr", self.lr)
        _positive("learner.optimizer.grad_clip", self.grad_clip)
        _not_negative("learner.optimizer.warmup", self.warmup)
        _not_negative("learner.optimizer.weight_decay", self.weight_decay)
        _require(
            0 <= self.min_lr_ratio <= 1,
            f"learner.optimizer.min_lr_ratio: must be at least 0 and at most 1, got {self.min_lr_ratio}",
        )
        _require(
            0 <= self.muon_momentum < 1,
            f"learner.optimizer.muon_momentum: must be at least 0 and below 1, got {self.muon_momentum}",
        )
        _require(
            all(0 <= beta < 1 for beta in self.betas),
            f"learner.optimizer.betas: must be at least 0 and below 1, got {list(self.betas)}",
        )


@dataclass(frozen=True)
class LearnerConfig:
    """The policy being trained."""

    ranks: int = 1
    """Processes; one GPU each, where there are GPUs."""
    zero: Literal[0, 1, 2, 3] = 1
    """DeepSpeed's ZeRO stage; 0 keeps no masters, so it is for float32 models. `muon` and `adamw_8bit` need it."""
    backend: Backend = "auto"
    """How low-bit products are computed. `engine`: by vLLM's own op; `fused`: by our kernels (CUDA); `emulated`: by the definition,
    in torch; `auto`: by the first of these that runs here, the other ops being the engine's too where they can, as they are at
    `bf16` in a 16-bit model (with `rollout.engine=torch`: `emulated`, as that engine computes); `none`: the learner computes
    unquantized, by transformers' ops (not aligned, for comparison; on a GPU experts in bfloat16 are ours, which are faster)."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and schedule."""
    tokens: int = 4096
    """Packed tokens of a micro-batch, at most."""
    logprob_chunk: int = 1024
    """Tokens whose vocabulary logits exist at a time."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward."""
    threads: int | None = None
    """CPU threads of a rank; `None`: OMP_NUM_THREADS, or else all cores over the ranks."""

    def __post_init__(self) -> None:
        for name in ("ranks", "tokens", "logprob_chunk"):
            _positive(f"learner.{name}", getattr(self, name))
        if self.threads is not None:
            _positive("learner.threads", self.threads)
        _require(
            self.zero == 0 or self.optimizer.name == "adamw",
            f"learner.optimizer.name: {self.optimizer.name!r} needs whole matrices, which learner.zero={self.zero} cuts up; "
            "choices: 'adamw', or learner.zero=0",
        )


@dataclass(frozen=True)
class PlacementConfig:
    """Where processes run."""

    mode: Literal["colocate", "split"] = "colocate"
    """`colocate`: engine and learner take turns on the same devices; `split`: devices of their own."""
    gpus: int = 0
    """GPUs of the run; 0 runs on CPU."""
    gpu_gb: float = 141.0
    """Memory of one GPU, for the plan."""
    address: str | None = None
    """A running Ray cluster; `None` starts one here."""


@dataclass(frozen=True)
class SyncConfig:
    """The proof that the engine serves what the learner published."""

    tiles: int = 4
    """Quantized tensors whose dequantized columns are compared at each sync."""
    tile_tolerance: float = 0.01
    """Largest difference of a tile, relative to the largest weight of the columns compared."""
    canaries: int = 4
    """Held-out prompts whose own tokens are scored by both sides at each sync."""
    canary_tolerance: float = 0.02
    """Largest mean |difference| of their log-probs, nats. Emulated backends on CPUs without VNNI need more. Not checked with
    `learner.backend=none`."""

    def __post_init__(self) -> None:
        _not_negative("sync.tiles", self.tiles)
        _not_negative("sync.canaries", self.canaries)
        _positive("sync.tile_tolerance", self.tile_tolerance)
        _positive("sync.canary_tolerance", self.canary_tolerance)


@dataclass(frozen=True)
class CorrectLimits:
    """Beyond these a step is corrected, as `qarl.guard` says. `None`: never."""

    mismatch: float | None = None
    """`mismatch/mean_abs`, nats a token, at most."""
    ess: float | None = None
    """`mismatch/ess_token`, a share, at least."""
    kl: float | None = None
    """`objective/kl_step`, nats a token, at most. A mini-batch sees what those before it did: of the first it is 0, so to correct
    needs `algorithm.mini_batches` of 3 or more."""
    grad_norm: float | None = None
    """`grad_norm`, before clipping, at most; to correct, of any but the last mini-batch, after which nothing is left to skip."""
    timeouts: float | None = None
    """`reward/timeout_share`, at most."""

    def check(self, level: str) -> None:
        """Raise `ConfigError` for a limit that is none."""
        for limit in fields(self):
            value, key = getattr(self, limit.name), f"guard.{level}.{limit.name}"
            if value is not None and limit.name in ("ess", "error_share", "timeouts", "dropped"):
                _require(0 <= value < 1, f"{key}: a share, must be at least 0 and below 1, got {value}")
            elif value is not None and limit.name == "entropy_drift":
                _require(value > 1, f"{key}: a factor, must be above 1, got {value}")
            elif value is not None:
                _positive(key, value)


@dataclass(frozen=True)
class Limits(CorrectLimits):
    """Of everything that is watched."""

    entropy_drift: float | None = None
    """`guard/entropy_drift`, a factor to either side, at most."""
    error_share: float | None = None
    """`error_tokens/share`, at most."""
    dropped: float | None = None
    """`mismatch/dropped_share`, at most."""


@dataclass(frozen=True)
class WarnLimits(Limits):
    """Beyond these the terminal says so, once, and the run goes on."""

    mismatch: float | None = 0.1
    """As in `correct`; the quickstart differs by 1e-3."""
    ess: float | None = 0.5
    """As in `correct`: half of the tokens would not count."""
    kl: float | None = 0.1
    """As in `correct`; a ratio of 1.3 at every token is 0.04."""
    error_share: float | None = 0.5
    """`error_tokens/share`: most responses are loops or garbage."""
    timeouts: float | None = 0.1
    """As in `correct`: one in ten is scored wrong without having been read."""
    dropped: float | None = 0.0
    """`mismatch/dropped_share`: no log-prob should be NaN or infinite."""


@dataclass(frozen=True)
class StopLimits(Limits):
    """After `patience` steps in a row beyond these the run stops; NaN and infinity stop it at once."""

    mismatch: float | None = 1.0
    """As in `correct`: sampler and learner are different policies."""
    grad_norm: float | None = 1e4
    """As in `correct`: far beyond what clipping is for."""
    dropped: float | None = 0.5
    """`mismatch/dropped_share`: most of what was sampled is not learnt from."""


@dataclass(frozen=True)
class GuardConfig:
    """When a run is warned about, corrected, and stopped with its state saved and a non-zero exit."""

    warn: WarnLimits = field(default_factory=WarnLimits)
    """Said."""
    correct: CorrectLimits = field(default_factory=CorrectLimits)
    """Acted upon, in the same step."""
    stop: StopLimits = field(default_factory=StopLimits)
    """The end."""
    patience: int = 3
    """Steps in a row beyond a limit of `stop`, or not learnt from because of `correct`, before the run stops."""

    def __post_init__(self) -> None:
        self.warn.check("warn")
        self.correct.check("correct")
        self.stop.check("stop")
        _positive("guard.patience", self.patience)


@dataclass(frozen=True)
class LoggingConfig:
    """Where metrics go, besides `metrics.jsonl`."""

    wandb: Literal["offline", "online", "disabled"] = "offline"
    """`offline` writes a folder that `wandb sync` uploads later."""
    project: str = "qarl"
    """W&B project."""
    progress: bool = True
    """Show a progress display."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What a killed run continues from."""

    every: int = 10
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest complete ones that are kept."""

    def __post_init__(self) -> None:
        _positive("checkpoint.every", self.every)
        _positive("checkpoint.keep", self.keep)


@dataclass(frozen=True)
class EvaluationConfig:
    """Scoring of held-out prompts, by the engine at the run's format."""

    every: int = 0
    """Steps between evaluations; 0: only before the first step and after the last."""
    prompts: int = 128
    """Held-out prompts, from the first on."""
    n: int = 1
    """Completions of a prompt."""
    temperature: float = 0.0
    """0: greedy."""

    def __post_init__(self) -> None:
        _not_negative("evaluation.every", self.every)
        _positive("evaluation.prompts", self.prompts)
        _positive("evaluation.n", self.n)
        _not_negative("evaluation.temperature", self.temperature)
        _require(
            self.n == 1 or self.temperature > 0,
            f"evaluation.n: {self.n} greedy completions of a prompt are one and the same; give evaluation.temperature, or "
            "evaluation.n=1",
        )


@dataclass(frozen=True)
class RunConfig:
    """One run."""

    name: str = "run"
    """The run lives in `out`/`name`."""
    out: str = "runs"
    """Folder of runs."""
    seed: int = 0
    """Of prompts, sampling and everything else that is drawn."""
    steps: int = 100
    """Rollouts."""
    resume: Literal["never", "auto"] = "never"
    """`auto` continues from the newest complete checkpoint, if there is one; `never` moves an old run of that name aside."""
    plan: bool = False
    """Print the plan of memory and placement, and stop."""
    model: ModelConfig = field(default_factory=lambda: ModelConfig(pocket=PocketConfig()))
    """Policy."""
    data: DataConfig = field(default_factory=DataConfig)
    """Prompts."""
    reward: RewardConfig = field(default_factory=RewardConfig)
    """Scoring."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Sampler."""
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    """Objective."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    """Learner."""
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    """Devices."""
    sync: SyncConfig = field(default_factory=SyncConfig)
    """Proof at each weight sync."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Limits."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    """Sinks."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Saving."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out accuracy."""

    def __post_init__(self) -> None:
        _require(
            self.name not in ("", ".", "..") and "/" not in self.name,
            f"name: must be a plain folder name (out= says where it lies), got {self.name!r}",
        )
        _not_negative("seed", self.seed)
        _not_negative("steps", self.steps)
        self._check_placement()
        for key, dataset in {"data.train": self.data.train, "data.heldout": self.data.heldout}.items():
            _require(
                self.reward.kind != "reasoning_gym" or dataset.source.startswith("reasoning_gym:"),
                f"reward.kind: 'reasoning_gym' scores its own tasks, but {key}.source is {dataset.source!r}; "
                "choices: 'math', 'exact', or a source reasoning_gym:TASK",
            )
            pocket = self.model.pocket
            _require(
                not pocket
                or not pocket.steps
                or dataset.source != "reasoning_gym:chain_sum"
                or dataset.template == pocket.template,
                f"{key}.template: {dataset.template!r}, but the pocket model is warm-started, on what is not held out, with "
                f"model.pocket.template={pocket.template if pocket else ''!r}; they have to be the same",
            )
        _require(
            self.model.dtype == "float32" or self.learner.zero > 0,
            "learner.zero: 0 keeps no float32 masters of a bfloat16 model; choices: 1, 2 or 3 (on one rank they are the same "
            "step), or model.dtype=float32",
        )
        longest = self.data.max_prompt_tokens + self.rollout.sampling.max_tokens
        _require(
            longest <= self.model.max_tokens,
            f"model.max_tokens: {self.model.max_tokens} cannot hold data.max_prompt_tokens + "
            f"rollout.sampling.max_tokens = {longest}",
        )
        _require(
            self.model.max_tokens <= self.learner.tokens,
            f"learner.tokens: {self.learner.tokens} cannot hold one sequence of model.max_tokens = {self.model.max_tokens}",
        )
        for limit, least in {"kl": 3, "grad_norm": 2}.items():
            _require(
                getattr(self.guard.correct, limit) is None or self.algorithm.mini_batches >= least,
                f"guard.correct.{limit}: with algorithm.mini_batches={self.algorithm.mini_batches} nothing is left to skip once it "
                f"is seen; needs {least} or more",
            )

    @property
    def carrier(self) -> Literal["host", "ipc", "broadcast"]:
        """How the placement asks published weights to travel; see `qarl.bridge`."""
        if not self.placement.gpus or self.rollout.engine != "vllm":
            return "host"
        return "ipc" if self.placement.mode == "colocate" else "broadcast"

    def _check_placement(self) -> None:
        gpus, mode = self.placement.gpus, self.placement.mode
        _not_negative("placement.gpus", gpus)
        _require(
            gpus > 0 or mode == "colocate",
            f"placement.mode: {mode!r} says which GPUs are whose, but placement.gpus is 0; choices: 'colocate', or placement.gpus",
        )
        _require(
            not self.rollout.sleep or (gpus > 0 and mode == "colocate" and self.rollout.engine == "vllm"),
            "rollout.sleep: an engine sleeps for a learner on its GPU: needs rollout.engine=vllm, placement.mode=colocate and "
            f"placement.gpus, got {self.rollout.engine}, {mode} and {gpus}",
        )
        if gpus == 0:
            return
        ranks, engines = self.learner.ranks, self.rollout.replicas * self.rollout.tensor_parallel
        need = max(ranks, engines) if mode == "colocate" else ranks + engines
        _require(
            need == gpus,
            f"placement.gpus: {gpus} GPUs, but mode {mode!r} with {ranks} learner ranks (learner.ranks) and "
            f"{engines} engine GPUs (rollout.replicas x rollout.tensor_parallel) uses {need}",
        )
        _require(
            mode == "split" or engines <= ranks,
            f"rollout.replicas: {engines} colocated engine GPUs (rollout.replicas x rollout.tensor_parallel), but each is "
            f"shared with a rank of the learner, and learner.ranks is {ranks}",
        )
