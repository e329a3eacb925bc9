"""What a sampler is, whichever engine runs it: it owns no policy, it serves the one that was published last.

An engine starts without weights and gets all of them through `refill`, so a fresh engine and one that has run for a
thousand steps serve the same tokens. `refill` proves what it serves before it says so; see `qarl.rollout.proof`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from qarl import carriers, formats
from qarl.config import RolloutConfig
from qarl.errors import ConfigError, EngineError, SyncError
from qarl.kernels.checksum import pending
from qarl.records import Completion, Prompt, RefillReport, Sampling, WeightUpdate
from qarl.rollout import proof
from qarl.rollout.ranks import ALONE, Ranks
from qarl.stages import Stages
from qarl.transfer import Address, Delivery, HostDelivery, Inlet, Manifest, Tensors
from qarl.wire import Specs, named_sums


def open_engine(
    config: RolloutConfig,
    path: str | Path,
    dtype: str,
    max_tokens: int,
    tile_tolerance: float = 0.02,
    rank: int = 0,
    meeting: str = "",
    revision: str | None = None,
) -> Engine:
    """The engine that `config.engine` names, without weights; of several ranks (`config.tensor_parallel`), this one.

    `path`: the model's folder, or its hub name at `revision` (config and tokenizer; weights are not read); `dtype`: of
    activations and kept weights;
    `max_tokens`: of prompt and response together; `meeting`: where ranks meet, tcp://host:port of rank 0's node. Ranks start
    together, and are given every call together. Raises `ConfigError` where this machine cannot run the format.
    """
    if config.engine == "vllm":
        from qarl.rollout.vllm_engine import VllmEngine

        ranks = Ranks(rank, config.tensor_parallel, meeting)
        return VllmEngine(config, path, dtype, max_tokens, tile_tolerance, ranks, revision)
    from qarl.rollout.torch_engine import TorchEngine

    return TorchEngine(config, path, dtype, max_tokens, tile_tolerance, revision)


class Engine(ABC):
    """A sampler at one format. Engines fill in the abstract methods; the order of a refill is the same for all."""

    def __init__(
        self,
        config: RolloutConfig,
        path: str | Path,
        max_tokens: int,
        tile_tolerance: float,
        ranks: Ranks = ALONE,
        revision: str | None = None,
    ) -> None:
        self.format = formats.get(config.format)
        context = AutoConfig.from_pretrained(path, revision=revision).max_position_embeddings
        if max_tokens > context:
            raise ConfigError(f"model.max_tokens: {max_tokens} is beyond the model's context of {context} tokens")
        self.max_tokens = max_tokens
        self.tile_tolerance = tile_tolerance
        self.ranks = ranks
        self.device = torch.device("cpu")
        """Where published tensors are wanted."""
        self.version: int | None = None
        """Of the last good refill."""
        self._inlet: Inlet | None = None
        self._refusal: str | None = "it was never refilled"
        """Why it would be wrong to generate now."""

    @abstractmethod
    def _expected(self) -> Specs:
        """Every tensor this engine's own model wants."""

    def _share(self, delivery: Delivery) -> Delivery:
        """Of what is published, what `_expected` speaks of: all of it, but in one of several ranks."""
        return delivery

    @abstractmethod
    def _load(self, tensors: Tensors) -> None:
        """Serve these from now on. `tensors`: as `_expected`, of whole modules, read-only views."""

    def _forget_homes(self) -> None:  # noqa: B027 (nothing, where an engine knows of none)
        """What is known of where tensors live came from a refill that was never proved: they go through the engine's own loader
        again."""

    def _can_read_back(self, tensor: str) -> bool:
        """Whether `_read_back` knows the tensor, now that it was loaded."""
        return False

    def _read_back(self, tensors: Specs) -> Tensor:
        """int64 [parts]: pending checksums of what is served now, as it was published, of tensors that can be read back."""
        return torch.empty(0, dtype=torch.int64)

    @abstractmethod
    def _loaded(self) -> None:
        """All tensors of a version were loaded: forget every cache of the old ones."""

    @abstractmethod
    def _served_columns(self, tensor: str, columns: np.ndarray) -> Tensor:
        """float32 [..., N, C]: the columns of a covered weight as its live layer multiplies by them, where it computes."""

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

    def sleep(self) -> None:
        """Give the memory of weights and caches back; the next refill wakes the engine. Raises `EngineError` where it cannot."""
        raise EngineError("this engine cannot sleep (rollout.sleep)")

    @abstractmethod
    def _wake_weights(self) -> None:
        """There is memory for weights again, where the engine slept."""

    @abstractmethod
    def _wake_caches(self) -> None:
        """There is memory for caches again, likewise."""

    def refill(self, update: WeightUpdate, canaries: Sequence[np.ndarray] = ()) -> RefillReport:
        """Serve the published weights, proved, and score the canaries with them.

        Raises `SyncError`; then nothing is generated until a good refill.
        """
        return self._receive(lambda: HostDelivery(update), canaries)

    def connect(self, address: Address) -> None:
        """Hold a line to a learner, which opens its door at the same time. A line from before is cut."""
        self._cut_line()
        self._inlet = carriers.call(address, self.device)

    def _cut_line(self) -> None:
        if self._inlet:
            self._inlet.close()
        self._inlet = None

    def refill_from_line(self, canaries: Sequence[np.ndarray] = ()) -> RefillReport:
        """`refill` with what comes over the line, as it comes. Raises `SyncError`, also where the learner dies meanwhile."""
        if not self._inlet:
            raise EngineError("the engine has no line to a learner")
        return self._receive(self._inlet.begin, canaries)

    def _receive(self, begin: Callable[[], Delivery], canaries: Sequence[np.ndarray]) -> RefillReport:
        self._refusal = "its last refill failed"
        stages = Stages()
        if self.version is None:
            self._forget_homes()
        with self.ranks.together():
            with stages("wait"):
                delivery = begin()
            try:
                delivery = self._share(delivery)
                if self.version is not None and delivery.version < self.version:
                    raise SyncError(
                        f"weights of version {delivery.version} are stale: version {self.version} is being served"
                    )
                with stages("verify"):
                    contract, expected = self.contract_hash(), self._expected()
                    proof.check_contract(delivery, expected, self.format, contract)
                    # What is held wider than it was published is checked as it arrived: it holds other bytes.
                    same = {name for name, parts in expected.items() if parts == delivery.specs[name]}
                with stages("wake"):
                    self._wake_weights()
                arrived = self._load_all(delivery, same, stages)
                with stages("verify"):
                    served = {name: expected[name] for name in expected if name in same and self._can_read_back(name)}
                    sums = self._read_back(served)  # the device sums while canaries are scored
                with stages("wake"):
                    self._wake_caches()
            except BaseException:
                delivery.abandon()
                raise
        with self.ranks.together():
            try:
                with stages("canary"):
                    scores = self._score_canaries(canaries) if canaries else []
            finally:  # weights that cannot even be scored are named, if they are not those that were published
                manifest = self._manifest(delivery, stages)
                with stages("verify"):
                    error = self._prove(arrived, served, sums, manifest)
        error = max(self.ranks.gather(error))
        self.version, self._refusal = delivery.version, None
        return RefillReport(delivery.version, contract, stages.seconds, error, scores)

    def _score_canaries(self, canaries: Sequence[np.ndarray]) -> list[np.ndarray]:
        """float32 [L - 1] of each: the same sequences at every sync."""
        return self._score(canaries, [1] * len(canaries))

    def _manifest(self, delivery: Delivery, stages: Stages) -> Manifest:
        """Asked for last: the learner sums and takes its tiles while the engine scores."""
        try:
            with stages("wait"):
                return delivery.manifest()
        except BaseException:
            delivery.abandon()
            raise

    def _prove(self, arrived: Tensors, served: Specs, sums: Tensor, manifest: Manifest) -> float:
        """The worst tile, once every checksum is the published one. `sums`: of all parts of `served`, in its order."""
        pending_sums = [one.to(self.device).view(1) for parts in arrived.values() for one in parts.values()]
        held = named_sums({**arrived, **served}, torch.cat([*pending_sums, sums.to(self.device)]))
        proof.check_sums(manifest.checksums, held, served)
        return proof.worst_tile(manifest.tiles, self._served_columns, self.tile_tolerance)

    def _load_all(self, delivery: Delivery, same: set[str], stages: Stages) -> Tensors:
        """Pending checksums of parts as they arrived, but of those in `same` that can be read back instead."""
        arrived: Tensors = {}
        with closing(delivery.buckets()) as buckets:
            while True:
                with stages("wait"):
                    tensors = next(buckets, None)
                if tensors is None:
                    break
                with stages("load"):
                    self._load(tensors)
                with stages("verify"):
                    for name, parts in tensors.items():
                        if name not in same or not self._can_read_back(name):
                            arrived[name] = {part: pending(values) for part, values in parts.items()}
        with stages("load"):
            self._loaded()
        return arrived

    def _require_proved(self) -> None:
        if self._refusal:
            raise EngineError(f"the engine does not generate: {self._refusal}")

    def _require_room(self, n_tokens: int, what: str) -> None:
        if n_tokens > self.max_tokens:
            raise EngineError(f"{what} needs {n_tokens} tokens, but model.max_tokens is {self.max_tokens}")
