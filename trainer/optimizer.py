"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from qarl.config import OptimizerConfig

Named = Iterable[tuple[str, torch.nn.Parameter]]


def lr_at(step: int, config: OptimizerConfig, total: int) -> float:
    """Learning rate of the optimizer step number `step`, from 0. Pure, so that a resumed run needs no schedule state.

    Linear warm-up over `warmup` steps (the first is already above 0), then the schedule; a decaying one reaches
    `min_lr_ratio` of the peak with step `total` - 1 and stays there.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    done = min((step - config.warmup + 1) / max(total - config.warmup, 1), 1.0)
    match config.schedule:
        case "constant":
            return config.lr
        case "linear":
            share = 1 - done
        case "cosine":
            share = 0.5 * (1 + math.cos(math.pi * done))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)


def make_optimizer(parameters: Named, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer before DeepSpeed shards it. Weight decay reaches matrices only, never norms and biases.

    Only AdamW may be sharded: Muon needs whole matrices, and 8-bit moments are in blocks that a shard would cut up, so that they
    could not be saved. `LearnerConfig` refuses the rest.
    """
    named = list(parameters)
    decayed = [p for _, p in named if p.ndim >= 2]
    others = [p for _, p in named if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    match config.name:
        case "adamw":
            return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)
        case "adamw_8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(groups, lr=config.lr, betas=config.betas)
        case "muon":
            from qarl.trainer.muon import Muon

            return Muon(named, config)
