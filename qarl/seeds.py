"""Seeds of everything drawn: functions of the run's seed and of where in the run one is, never of what happened before."""

from __future__ import annotations

import zlib

import numpy as np


def completion_seeds(seed: int, purpose: str, step: int, prompts: int, n: int) -> np.ndarray:
    """int64 [prompts, n], each in 0 … 2^31 - 1: one for every completion of a step.

    A resumed run, or an engine that was started again, draws the same ones.
    """
    key = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), step])
    return np.random.Generator(np.random.Philox(key)).integers(2**31, size=(prompts, n), dtype=np.int64)


def mini_batch_order(seed: int, step: int, samples: int) -> np.ndarray:
    """int64 [samples]: the order in which a step's samples are dealt to its mini-batches."""
    key = np.random.SeedSequence([seed, zlib.crc32(b"mini_batches"), step])
    return np.random.Generator(np.random.Philox(key)).permutation(samples)
