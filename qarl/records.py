"""What crosses a process border: frozen records over numpy arrays, so that Ray moves them without copying.

    data ── Prompt ──► engine ── Completion ──► reward ── Sample ──► batching ── MicroBatch ──► learner ── UpdateStats ──► metrics
    learner ── WeightUpdate (published) ──► engine ── RefillReport ──► loop

Letters: B sequences, L tokens of one response, P tokens of one prompt, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from qarl.error_tokens import is_error


@dataclass(frozen=True)
class Prompt:
    """One question, as the engine gets it. Made by `data`, owned by the loop until its completions are scored."""

    id: int
    """Position in the prompt stream; unique in a run, the same after a resume."""
    text: str
    """What was tokenized, after the chat template."""
    tokens: np.ndarray
    """int32 [P]."""
    answer: str
    """The reference a reward verifies against."""
    extras: Mapping[str, object] = field(default_factory=dict)
    """The other mapped fields of the data set's row, for rewards that need them."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn."""

    temperature: float = 1.0
    """0: greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all tokens."""
    max_tokens: int = 256
    """Tokens of one completion, at most."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; the tokens that spell them stay in it (training must see them)."""


@dataclass(frozen=True)
class Completion:
    """One response, as the engine wrote it."""

    prompt: int
    """`Prompt.id`."""
    sample: int
    """0..n-1 among the completions of the prompt."""
    tokens: np.ndarray
    """int32 [L]. Ends with EOS where `finish` is `stop` and no stop string was met."""
    logprobs: np.ndarray
    """float32 [L], nats: of each sampled token under the distribution it was sampled from, temperature applied. These are
    `sampler_logprobs`. Greedy completions report the untempered distribution."""
    text: str
    """`tokens` decoded, special tokens left out."""
    finish: str
    """`stop` (EOS or a stop string) or `length`."""
    version: int
    """Version of the weights that wrote every token of it."""


@dataclass(frozen=True)
class Sample:
    """A completion with everything the learner needs. Made by the loop."""

    completion: Completion
    prompt_tokens: np.ndarray
    """int32 [P]."""
    reward: float
    advantage: float
    old_logprobs: np.ndarray | None = None
    """float32 [L], nats: the aligned forward at the published version. `None` until scored."""
    repetition: float = 0.0
    """Share of its tokens in loops, `error_tokens.repetition_rate`."""
    garbling: float = 0.0
    """Share of its characters in no language, `error_tokens.garbling_rate`."""

    @property
    def is_error(self) -> bool:
        return is_error(self.repetition, self.garbling)


@dataclass(frozen=True)
class MicroBatch:
    """Whole sequences packed one after another: what one forward and backward of one rank takes.

    Example, two sequences with prompts of 2 and 1 and responses of 1 and 2 tokens: `tokens` has 6 entries, `lengths` is
    [3, 3], `prompt_lengths` is [2, 1]; `targets` picks the 3 response tokens, at positions [2, 4, 5].
    """

    tokens: np.ndarray
    """int32 [T]: prompt and response of each sequence, packed."""
    lengths: np.ndarray
    """int32 [B]: tokens of each sequence, prompt included; sums to T."""
    prompt_lengths: np.ndarray
    """int32 [B]: prompt tokens of each sequence, at least 1."""
    sampler_logprobs: np.ndarray
    """float32 [R], R response tokens of all sequences, packed in the same order."""
    old_logprobs: np.ndarray | None
    """float32 [R]. `None` when the batch is only to be scored."""
    advantages: np.ndarray
    """float32 [B]."""
    errors: np.ndarray | None = None
    """bool [B]: responses of error tokens, told apart in the statistics alone. `None`: none is."""

    @property
    def n_sequences(self) -> int:
        return len(self.lengths)

    @property
    def n_response_tokens(self) -> int:
        return int((self.lengths - self.prompt_lengths).sum())


@dataclass(frozen=True)
class MiniBatch:
    """The samples of one optimizer step, spread over ranks.

    Every rank gets the same number of micro-batches, because ZeRO-3 gathers weights in lock step; one with no sequence
    (lengths of size 0) is a filler: the learner runs it on a dummy token with weight zero.
    """

    ranks: tuple[tuple[MicroBatch, ...], ...]
    """[rank][micro-batch]."""
    n_sequences: int
    """Sequences over all ranks that enter the objective: its normaliser, known before the first backward."""
    n_tokens: int
    """Their response tokens over all ranks, likewise."""
    n_kept_back: int = 0
    """Sequences that are in no micro-batch: the learner's own forward of them is not finite, and so would be its gradient."""


@dataclass(frozen=True)
class Tile:
    """A few dequantized weights the learner computed with, for the engine to compare with what it serves."""

    tensor: str
    """Fused name."""
    columns: np.ndarray
    """int64 [C]: input features."""
    values: np.ndarray
    """float32 [N, C] of a matrix, [E, N, C] of experts: the dequantized columns, all output features."""


@dataclass(frozen=True)
class WireTensor:
    """A tensor as bytes, since numpy has neither bfloat16 nor float8."""

    data: np.ndarray
    """uint8, one dimension, contiguous."""
    dtype: str
    """torch's name: `bfloat16`, `int8`, …"""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightUpdate:
    """The policy as the learner computes with it: codes and scales of quantized tensors, the rest as it is."""

    version: int
    format: str
    contract_hash: str
    tensors: Mapping[str, Mapping[str, WireTensor]]
    """Fused name -> part -> tensor. Parts of a quantized tensor are named as compressed-tensors names them (`weight`,
    `weight_scale`; `weight_packed`, …); a tensor that is kept has the one part `weight` (a bias: `bias`)."""
    checksums: Mapping[str, Mapping[str, int]]
    """`kernels.checksum.checksum` of each part, computed where it was made."""
    tiles: tuple[Tile, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Stage -> seconds: `gather`, `quantize`, `pack`."""

    @property
    def n_bytes(self) -> int:
        return sum(part.data.nbytes for parts in self.tensors.values() for part in parts.values())


@dataclass(frozen=True)
class RefillReport:
    """What the engine did with a `WeightUpdate`."""

    version: int
    contract_hash: str
    """Computed by the engine from its own model."""
    seconds: Mapping[str, float]
    """Stage -> seconds of the engine: `wait` (for what is to be loaded), `wake`, `load`, `canary`, `verify`."""
    max_tile_error: float
    """Largest |served - published| over the tiles, in units of the largest |weight| of each."""
    canaries: list[np.ndarray] = field(default_factory=list)
    """Of each sequence that was to be scored with the new weights, log-probs of the tokens after its first: float32 [L], nats at
    temperature 1."""


@dataclass(frozen=True)
class UpdateStats:
    """What one optimizer step saw. Sums over all ranks; `objectives.finalize` turns them into metrics."""

    sums: Mapping[str, float]
    grad_norm: float
    """Before clipping."""
    lr: float
    seconds: Mapping[str, float]
    """Stage -> seconds: `forward`, `backward`, `optimizer`."""


@dataclass(frozen=True)
class Standing:
    """What a learner says of itself once it stands."""

    contract_hash: str
    coverage: str
    arithmetic: str
    """How it computes: the backend of its products, where `auto` was asked for, and whose the other ops are."""


@dataclass(frozen=True)
class SyncRequest:
    """What the loop asks for at a weight sync."""

    version: int
    n_tiles: int
    """Quantized tensors of which columns are compared."""
    canaries: MiniBatch
    """Sequences that learner and engines score, to be compared: as the learner takes them."""
    sequences: list[np.ndarray]
    """The same, int32 [L] each, as engines take them."""


@dataclass(frozen=True)
class Published:
    """What the loop knows of a published version."""

    version: int
    contract_hash: str
    n_bytes: int
    """On the way to one engine."""
    seconds: Mapping[str, float]
    """Stage -> seconds of the learner: `gather`, `quantize`, `pack`; over lines `transfer`, for engines to let go of buffers."""
    canaries: list[list[np.ndarray]]
    """[rank][micro-batch] -> log-probs of the canaries' tokens at temperature 1, float32 [R], nats."""
