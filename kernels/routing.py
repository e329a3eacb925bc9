"""Rows sorted by expert, and where each expert's rows end."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def spans(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) of the experts that have any. Waits for the device: the loop is on the host."""
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            yield expert, slice(start, end)
        start = end
