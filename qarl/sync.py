"""One weight sync: publish, refill, and the proof that the engine serves what the learner computes."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import numpy as np

from qarl.batching import Order, pack_to_score
from qarl.cluster import LearnerGroup, Sampler
from qarl.config import RunConfig
from qarl.errors import SyncError
from qarl.records import Prompt, Published, RefillReport, SyncRequest


def sync(
    config: RunConfig,
    learner: LearnerGroup,
    sampler: Sampler,
    version: int,
    canaries: Sequence[Prompt],
    read_back: bool = False,
) -> dict[str, float]:
    """Bring every engine to the learner's weights, as `version`; returns the metrics `sync/*`.

    Engines check checksums, contract and tiles as they refill; here the contract is compared across processes, and the canaries
    that both sides scored meanwhile. `read_back`: tiles of every quantized tensor, however many `sync.tiles` are. Raises
    `SyncError`.
    """
    sequences = [prompt.tokens for prompt in canaries if len(prompt.tokens) > 1]
    batch, order = pack_to_score(sequences, learner.ranks, learner.tokens)
    n_tiles = sys.maxsize if read_back else config.sync.tiles

    def check(published: Published, reports: Sequence[RefillReport]) -> None:
        for report in reports:
            if report.contract_hash != published.contract_hash:
                raise SyncError(
                    f"version {version}: the engine's contract {report.contract_hash} is not the learner's "
                    f"{published.contract_hash}"
                )
        gap = canary_gap(order, published, reports)
        if config.learner.backend != "none" and not gap <= config.sync.canary_tolerance:
            raise SyncError(
                f"version {version}: on {len(sequences)} canaries engine and learner differ by {gap:.4g} nats a token, more than "
                f"sync.canary_tolerance = {config.sync.canary_tolerance}"
            )

    start = time.perf_counter()
    published, reports = sampler.refill(SyncRequest(version, n_tiles, batch, sequences), check)
    seconds = time.perf_counter() - start
    slowest = max(reports, key=lambda r: sum(r.seconds.values()))
    stages = {**published.seconds, **slowest.seconds}
    stages.setdefault("transfer", max(seconds - sum(stages.values()), 0.0))  # through the host, one after the other
    return {
        **{f"sync/{stage}_s": seconds for stage, seconds in stages.items()},
        "sync/total_s": seconds,
        "sync/gb": published.n_bytes / 1e9,
        "sync/tile_error": max(report.max_tile_error for report in reports),
        "sync/canary": canary_gap(order, published, reports),
        "guard/read_back": float(read_back),
    }


def canary_gap(order: Order, published: Published, reports: Sequence[RefillReport]) -> float:
    """Mean |difference| of the log-probs both sides give to the tokens of fixed prompts, nats; the worst engine's."""
    mine = order.unpack(published.canaries)
    if not mine:
        return 0.0
    gaps = [np.abs(np.concatenate(mine) - np.concatenate(report.canaries)).mean() for report in reports]
    return float(np.max(gaps))  # NaN where any is: Python's `max` would go by the order
