"""How much of a response is the loop that low-bit policies fall into: the same few tokens over and over."""

from collections.abc import Sequence

import numpy as np

MAX_NGRAM = 32
COPIES = 3
MIN_TOKENS = 8
GARBLED = 0.5


def repetition_rate(tokens: np.ndarray) -> float:
    """Share of `tokens` [L], any integers, that lie in a loop; 0 of an empty response.

    A loop is an n-gram, n <= 32, that stands there at least 3 times in a row and covers at least 8 tokens: so neither
    "1000" nor "no, no, no" is one. A trailing part of the n-gram belongs to its loop. Our own definition: the papers on
    error tokens give none.
    """
    tokens = np.asarray(tokens)
    looping = np.zeros(len(tokens), dtype=bool)
    for n in range(1, min(MAX_NGRAM, len(tokens) // COPIES) + 1):
        # Token t continues a loop where it equals token t - n. A run of r such tokens is a loop of r + n tokens.
        continues = tokens[n:] == tokens[:-n]
        shortest = max((COPIES - 1) * n, MIN_TOKENS - n)
        if np.count_nonzero(continues) < shortest:
            continue
        edges = np.flatnonzero(np.diff(continues, prepend=False, append=False))
        for start, end in edges.reshape(-1, 2):
            if end - start >= shortest:
                looping[start : end + n] = True
    return float(looping.mean()) if len(tokens) else 0.0


def error_token_metrics(responses: Sequence[np.ndarray]) -> dict[str, float]:
    """Of the responses of a step: the mean repetition rate, and the share of them in which it exceeds one half."""
    rates = np.array([repetition_rate(tokens) for tokens in responses] or [0.0])
    return {
        "error_tokens/repetition_rate": float(rates.mean()),
        "error_tokens/share": float((rates > GARBLED).mean()),
    }
