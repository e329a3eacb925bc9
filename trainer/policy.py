"""The module that DeepSpeed drives: packed tokens in, log-probs of the response tokens out."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qarl.kernels.attention import cumulative_lengths
from qarl.kernels.logprob import chunked_logprobs
from qarl.records import MicroBatch
from qarl.trainer.attention import positions

_NONE, _NO_VALUES = np.empty(0, np.int32), np.empty(0, np.float32)
FILLER = MicroBatch(_NONE, _NONE, _NONE, _NO_VALUES, _NO_VALUES, _NO_VALUES)


class Packed(NamedTuple):
    """One micro-batch as tensors."""

    tokens: Tensor
    """int64 [1, T]."""
    positions: Tensor
    """int64 [1, T], from 0 in every sequence."""
    sequence_lengths: list[int]
    """Add up to T."""
    cu_seqlens: Tensor
    """int32 [sequences + 1]: the same as attention kernels take it."""
    sources: Tensor
    """int64 [R]: where the hidden state stands that predicts each response token, one place before it."""
    targets: Tensor
    """int64 [R]: the response tokens."""
    sequence: Tensor
    """int64 [R]: which sequence each response token belongs to."""


def to_tensors(batch: MicroBatch, device: torch.device) -> Packed:
    """The micro-batch on the device. A filler becomes two dummy tokens, one of them to be scored."""
    lengths, prompts, tokens = batch.lengths, batch.prompt_lengths, batch.tokens
    if not batch.n_response_tokens:  # a filler, or empty responses only; ZeRO-3 needs a forward of every rank
        lengths, prompts, tokens = np.array([2]), np.array([1]), np.zeros(2, np.int64)
    starts = np.cumsum(lengths) - lengths
    spans = [np.arange(s + p, s + n) for s, p, n in zip(starts, prompts, lengths, strict=True)]
    where = np.concatenate(spans)
    sequence = np.repeat(np.arange(len(lengths)), lengths - prompts)

    def tensor(values: np.ndarray) -> Tensor:
        return torch.as_tensor(values.astype(np.int64), device=device)

    ints = [int(length) for length in lengths]
    row = tensor(tokens)[None]
    where_they_are = (row, positions(ints, device), ints, cumulative_lengths(ints, device))
    return Packed(*where_they_are, tensor(where - 1), tensor(tokens[where]), tensor(sequence))


class Policy(nn.Module):
    """Backbone, then log-probs and entropies in chunks of tokens: logits of all T tokens never exist at once."""

    def __init__(self, model: PreTrainedModel, temperature: float, chunk: int) -> None:
        super().__init__()
        self.model = model
        # On the module itself, so that DeepSpeed's hooks on it gather and release its weight around both directions.
        model.lm_head.forward = partial(_score, model.lm_head, chunk)
        self.temperature = temperature

    def forward(self, packed: Packed, temperature: float | None = None) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies in nats, each float32 [R], of the distribution at `temperature`, else at the sampler's."""
        hidden = self.model.model(
            input_ids=packed.tokens,
            position_ids=packed.positions,
            sequence_lengths=packed.sequence_lengths,
            cu_seqlens=packed.cu_seqlens,
            use_cache=False,
        ).last_hidden_state[0]
        at = self.temperature if temperature is None else temperature
        return self.model.lm_head(hidden[packed.sources], packed.targets, at)


def _score(head: nn.Linear, chunk: int, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return chunked_logprobs(hidden, head.weight, targets, temperature, chunk)
