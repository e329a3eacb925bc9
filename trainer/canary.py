"""What the learner makes of fixed sequences at each sync: log-probs of their tokens at temperature 1, for engines to repeat.

On a GPU the forward is a CUDA graph, captured when it is first asked for: to launch its kernels one by one takes several times as
long as to run them. The graph reads weights, and the codes made of them, where they lay; if any has moved, it is captured anew.
A forward that waits for the host is run kernel by kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qarl.kernels.graph import Recording
from qarl.records import MicroBatch
from qarl.trainer.aligned import AlignedModel
from qarl.trainer.policy import Policy, to_tensors

Scores = Callable[[], list[np.ndarray]]
"""The log-probs, once they are asked for."""


class Canary:
    """Of a policy whose weights are whole (ZeRO below 3)."""

    def __init__(self, policy: Policy, aligned: AlignedModel, device: torch.device) -> None:
        self._policy, self._aligned, self._device = policy, aligned, device
        self._weights = dict(policy.model.named_parameters())
        self._covered = {name: self._weights[name] for name in aligned.covered}
        self._recorded = device.type == "cuda" and not aligned.waits_for_host
        self._aside: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._captured: tuple[list[bytes], list[int], Recording[list[Tensor]]] | None = None

    def __call__(self, batches: Sequence[MicroBatch]) -> list[np.ndarray]:
        """float32 [R] of each micro-batch, nats."""
        return self.start(batches)()

    @torch.no_grad()
    def start(self, batches: Sequence[MicroBatch]) -> Scores:
        """The same, to be asked for later: on a GPU it is computed meanwhile, beside what the caller goes on to launch.

        The caller must not change weights or ask for codes that are stale before it has the answer.
        """
        if not self._recorded or not batches:
            return lambda: self._scores(batches)
        for name, weight in self._covered.items():
            self._aligned.codes(name, weight)  # a graph reads codes, it does not renew them
        asked = [b.tokens.tobytes() + b.lengths.tobytes() + b.prompt_lengths.tobytes() for b in batches]
        if self._captured is None or self._captured[:2] != (asked, self._addresses()):
            self._capture(asked, batches)
        assert self._captured is not None
        *_, recording = self._captured
        self._aside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._aside):
            found = recording.replay()
        return lambda: self._collect(found, batches)

    def _collect(self, found: Sequence[Tensor], batches: Sequence[MicroBatch]) -> list[np.ndarray]:
        torch.cuda.current_stream(self._device).wait_stream(self._aside)
        return _as_numpy(found, batches)

    @torch.no_grad()
    def _scores(self, batches: Sequence[MicroBatch]) -> list[np.ndarray]:
        return _as_numpy(self._forward([to_tensors(batch, self._device) for batch in batches]), batches)

    def _forward(self, packed: Iterable[Any]) -> list[Tensor]:
        return [self._policy(one, 1.0)[0] for one in packed]

    def _capture(self, asked: list[bytes], batches: Sequence[MicroBatch]) -> None:
        packed = [to_tensors(batch, self._device) for batch in batches]
        self._captured = None  # its memory is free for the next
        trains = self._policy.training
        self._policy.eval()  # gradient checkpointing would ask for the state of a random generator, which no graph may
        try:
            with torch.cuda.device(self._device):
                recording = Recording(lambda: self._forward(packed))
        finally:
            self._policy.train(trains)
        self._captured = asked, self._addresses(), recording

    def _addresses(self) -> list[int]:
        """Of what the kernels read. Looked at in every sync, before the device has anything to do."""
        read: list[Tensor] = list(self._weights.values())
        for prepared in self._aligned.prepared():
            _add_tensors(prepared.operand, read)
        return [tensor.data_ptr() for tensor in read]


def _as_numpy(found: Iterable[Tensor], batches: Sequence[MicroBatch]) -> list[np.ndarray]:
    return [v.float().cpu().numpy()[: b.n_response_tokens] for v, b in zip(found, batches, strict=True)]


def _add_tensors(value: Any, to: list[Tensor]) -> None:
    """Every tensor in what a backend's `prepare` made."""
    if isinstance(value, Tensor):
        to.append(value)
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            _add_tensors(inner, to)
    elif hasattr(value, "__dict__"):
        _add_tensors(vars(value), to)
