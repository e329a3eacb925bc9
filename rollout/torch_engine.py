"""The reference sampler: plain transformers and torch, any format emulated, on any machine. Slow, and easy to read.

Sampling is stateless. A token is drawn by inverting the cumulative distribution at one uniform number, a hash of the
completion's seed and the token's position, so it depends on nothing else: not on batch mates, nor on what was drawn before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from qarl.config import RolloutConfig
from qarl.records import Completion, Prompt, Sampling
from qarl.rollout.engine import Engine
from qarl.rollout.skeleton import Skeleton
from qarl.rollout.text import Text
from qarl.transfer import Tensors
from qarl.wire import Specs


class TorchEngine(Engine):
    """See `Engine`."""

    def __init__(
        self,
        config: RolloutConfig,
        path: str | Path,
        dtype: str,
        max_tokens: int,
        tile_tolerance: float = 0.02,
        revision: str | None = None,
    ) -> None:
        super().__init__(config, path, max_tokens, tile_tolerance, revision=revision)
        self.text = Text(path, revision)
        self._skeleton = Skeleton(path, getattr(torch, dtype), self.format, revision)
        self._batch = config.max_sequences

    def contract_hash(self) -> str:
        return self.format.contract_hash(self._skeleton.covered)

    def _expected(self) -> Specs:
        return self._skeleton.expected

    def _load(self, tensors: Tensors) -> None:
        self._skeleton.load(tensors)

    def _loaded(self) -> None: ...

    def _wake_weights(self) -> None: ...

    def _wake_caches(self) -> None: ...

    def _served_columns(self, tensor: str, columns: np.ndarray) -> Tensor:
        return self._skeleton.served_columns(tensor, torch.from_numpy(columns))

    def _generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray) -> list[Completion]:
        rows = [
            _Row(prompt, sample, int(seed), min(sampling.max_tokens, self.max_tokens - len(prompt.tokens)))
            for prompt, of_prompt in zip(prompts, seeds, strict=True)
            for sample, seed in enumerate(of_prompt)
        ]
        for start in range(0, len(rows), self._batch):
            self._write(rows[start : start + self._batch], sampling)
        texts = self.text.decode([row.tokens for row in rows])
        return [
            Completion(
                prompt=row.prompt.id,
                sample=row.sample,
                tokens=np.array(row.tokens, dtype=np.int32),
                logprobs=np.array(row.logprobs, dtype=np.float32),
                text=text,
                finish=row.finish,
                version=self.version,  # type: ignore[arg-type]
            )
            for row, text in zip(rows, texts, strict=True)
        ]

    @torch.no_grad()
    def _write(self, rows: list[_Row], sampling: Sampling) -> None:
        """Decode a batch to its end: left-padded, one forward a token, rows leave the batch as they finish."""
        tokens, mask = _left_padded([row.prompt.tokens for row in rows])
        cache = DynamicCache()
        while rows:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            logits = self._skeleton.model(
                tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
            ).logits[:, -1]
            drawn, logprobs = sample(logits.float(), sampling, [row.draw() for row in rows])
            for row, token, logprob in zip(rows, drawn.tolist(), logprobs.tolist(), strict=True):
                row.add(token, logprob, self.text, sampling.stop)
            tokens = drawn[:, None]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            running = [i for i, row in enumerate(rows) if not row.finish]
            if len(running) < len(rows):
                rows = [rows[i] for i in running]
                tokens, mask = tokens[running], mask[running]
                cache.batch_select_indices(torch.tensor(running, dtype=torch.long))

    @torch.no_grad()
    def _score(self, sequences: Sequence[np.ndarray], prompt_lengths: Sequence[int]) -> list[np.ndarray]:
        scores = []
        for sequence, n_prompt in zip(sequences, prompt_lengths, strict=True):
            tokens = torch.from_numpy(sequence).long()
            logprobs = self._skeleton.model(tokens[None]).logits[0, n_prompt - 1 : -1].float().log_softmax(-1)
            scores.append(logprobs.gather(1, tokens[n_prompt:, None])[:, 0].numpy())
        return scores

    def close(self) -> None:
        self._refusal = "it was closed"
        self._cut_line()
        del self._skeleton


class _Row:
    """One completion being written."""

    def __init__(self, prompt: Prompt, sample: int, seed: int, max_tokens: int) -> None:
        self.prompt, self.sample, self.seed, self.max_tokens = prompt, sample, seed, max_tokens
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish = ""

    def draw(self) -> float:
        return uniform(self.seed, len(self.tokens))

    def add(self, token: int, logprob: float, text: Text, stop: tuple[str, ...]) -> None:
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in text.eos or text.ends_with_stop(self.tokens, stop):
            self.finish = "stop"
        elif len(self.tokens) >= self.max_tokens:
            self.finish = "length"


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on the two alone: SplitMix64 of the seed, moved on by position."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) % 2**64
    for _ in range(2):  # twice, so that neighbouring seeds at neighbouring positions share nothing
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
    return (z >> 11) / 2**53


def sample(logits: Tensor, sampling: Sampling, uniforms: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Tokens int64 [B] drawn from logits [B, V], and their log-probs [B] under the distribution they were drawn from.

    Temperature 0 takes the largest logit and reports the untempered distribution.
    """
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    logprobs = truncate(logits / sampling.temperature, sampling.top_k, sampling.top_p).log_softmax(-1)
    cumulative = logprobs.double().exp().cumsum(-1)
    threshold = torch.tensor(uniforms, dtype=torch.float64)[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True)  # right: a token of probability 0 is never drawn
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]


def truncate(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """logits [B, V] with all but the `top_k` largest, then all but the fewest that hold `top_p` of the mass, at −inf."""
    if top_k:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        logits = logits.scatter(1, order, ordered.masked_fill(before >= top_p, -torch.inf))
    return logits


def _left_padded(prompts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Tokens and mask, int64 [B, P]. Padding is token 0, masked out."""
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for i, prompt in enumerate(prompts):
        tokens[i, longest - len(prompt) :] = torch.from_numpy(prompt).long()
        mask[i, longest - len(prompt) :] = 1
    return tokens, mask
