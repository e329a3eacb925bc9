"""What a sampler is, whichever engine runs it: it owns no policy, it serves the one that was published last.

An engine starts without weights and gets all of them through `refill`, so a fresh engine and one that has run for a
thousand steps serve the same tokens. `refill` proves what it serves before it says so; see `qarl.rollout.proof`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from qarl import formats
from qarl.config import RolloutConfig
from qarl.errors import ConfigError, EngineError, SyncError
from qarl.records import Completion, Prompt, RefillReport, Sampling, WeightUpdate
from qarl.rollout import proof


def open_engine(
    config: RolloutConfig, path: str | Path, dtype: str, max_tokens: int, tile_tolerance: float = 0.02
) -> Engine:
    """The engine that `config.engine` names, without weights.

    `path`: the model's folder (config and tokenizer; weights are not read); `dtype`: of activations and kept weights;
    `max_tokens`: of prompt and response together. Raises `ConfigError` where this machine cannot run the format.
    """
    if config.engine == "vllm":
        from qarl.rollout.vllm_engine import VllmEngine

        return VllmEngine(config, path, dtype, max_tokens, tile_tolerance)
    from qarl.rollout.torch_engine import TorchEngine

    return TorchEngine(config, path, dtype, max_tokens, tile_tolerance)


class Engine(ABC):
    """A sampler at one format. Engines fill in the abstract methods; the order of a refill is the same for all."""

    def __init__(self, config: RolloutConfig, path: str | Path, max_tokens: int, tile_tolerance: float) -> None:
        self.format = formats.get(config.format)
        context = AutoConfig.from_pretrained(path).max_position_embeddings
        if max_tokens > context:
            raise ConfigError(f"model.max_tokens: {max_tokens} is beyond the model's context of {context} tokens")
        self.max_tokens = max_tokens
        self.tile_tolerance = tile_tolerance
        self.version: int | None = None
        """Of the last good refill."""
        self._refusal: str | None = "it was never refilled"
        """Why it would be wrong to generate now."""

    @abstractmethod
    def _expected(self) -> Mapping[str, proof.Parts]:
        """Every tensor this engine's own model wants, under its fused name, part by part."""

    @abstractmethod
    def _load(self, tensors: Mapping[str, Mapping[str, Any]]) -> None:
        """Serve these from now on, and forget every cache of the old ones. `tensors`: as `_expected`, read-only views."""

    @abstractmethod
    def _served_columns(self, tensor: str, columns: np.ndarray) -> np.ndarray:
        """float32 [..., N, C]: the columns of a covered weight as its live layer multiplies by them."""

    @abstractmethod
    def contract_hash(self) -> str:
        """Of what this engine's own model holds, by name, shape, grid and group."""

    @abstractmethod
    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray) -> list[Completion]: ...

    @abstractmethod
    def _score(self, sequences: Sequence[np.ndarray], prompt_lengths: Sequence[int]) -> list[np.ndarray]: ...

    @abstractmethod
    def close(self) -> None:
        """Give back memory and threads. The engine cannot be used afterwards."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray) -> list[Completion]:
        """n completions of each prompt, grouped by prompt, in order.

        `seeds`: int64 [len(prompts), n]; the same seed, weights and prompt give the same tokens, also after a restart.
        Raises `EngineError` before the first refill, after a failed one, and for a prompt that leaves no room to answer.
        """
        self._require_proved()
        if seeds.ndim != 2 or len(seeds) != len(prompts):
            raise EngineError(f"seeds of shape {list(seeds.shape)} do not fit {len(prompts)} prompts")
        for prompt in prompts:
            self._require_room(len(prompt.tokens) + 1, f"prompt {prompt.id}")
        return self._generate(prompts, sampling, seeds)

    def score(self, sequences: Sequence[np.ndarray], prompt_lengths: Sequence[int]) -> list[np.ndarray]:
        """float32 [L] for each sequence: log-probs, in nats and at temperature 1, of the tokens after its prompt."""
        self._require_proved()
        for i, sequence in enumerate(sequences):
            self._require_room(len(sequence), f"sequence {i}")
        return self._score(sequences, prompt_lengths)

    def refill(self, update: WeightUpdate) -> RefillReport:
        """Serve the published weights, proved. Raises `SyncError`; then nothing is generated until a good refill."""
        self._refusal = "its last refill failed"
        seconds = {}
        start = time.perf_counter()
        if self.version is not None and update.version < self.version:
            raise SyncError(f"weights of version {update.version} are stale: version {self.version} is being served")
        contract = self.contract_hash()
        tensors = proof.checked(update, self._expected(), self.format, contract)
        seconds["verify"] = time.perf_counter() - start
        start = time.perf_counter()
        self._load(tensors)
        seconds["load"] = time.perf_counter() - start
        start = time.perf_counter()
        error = proof.worst_tile(update.tiles, self._served_columns, self.tile_tolerance)
        seconds["verify"] += time.perf_counter() - start
        self.version, self._refusal = update.version, None
        return RefillReport(update.version, contract, seconds, error)

    def _require_proved(self) -> None:
        if self._refusal:
            raise EngineError(f"the engine does not generate: {self._refusal}")

    def _require_room(self, n_tokens: int, what: str) -> None:
        if n_tokens > self.max_tokens:
            raise EngineError(f"{what} needs {n_tokens} tokens, but model.max_tokens is {self.max_tokens}")
