"""Muon for matrices and packed experts, AdamW for everything else, as one optimizer.

Muon: momentum, then its nearest orthogonal matrix by five Newton-Schulz steps (https://kellerjordan.github.io/posts/muon/).
`torch.optim.Muon` takes matrices alone; here leading dimensions are a batch, so that every expert is a matrix of its own.
Otherwise the numbers are torch's: Nesterov, bfloat16 iteration, decoupled decay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qarl.config import OptimizerConfig

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, chosen for a steep slope at 0
STEPS, EPSILON = 5, 1e-7
#: A step has the root mean square of 0.2 in every matrix, AdamW's usual one, so that both take one learning rate (Moonlight,
#: arXiv 2502.16982).
RMS = 0.2


class Muon(torch.optim.Optimizer):
    """Its state: `momentum_buffer` of matrices; `exp_avg`, `exp_avg_sq`, `step` of the rest."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig) -> None:
        """Embeddings and the head are not hidden matrices and go to AdamW, as Muon's author advises."""
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in named:
            hidden = parameter.ndim >= 2 and "embed_tokens" not in name and "lm_head" not in name
            (matrices if hidden else others).append(parameter)
        groups = [
            {"params": matrices, "muon": True, "weight_decay": config.weight_decay},
            {"params": [p for p in others if p.ndim >= 2], "muon": False, "weight_decay": config.weight_decay},
            {"params": [p for p in others if p.ndim < 2], "muon": False, "weight_decay": 0.0},
        ]
        super().__init__([group for group in groups if group["params"]], {"lr": config.lr})
        self.momentum = config.muon_momentum
        # torch keeps the very dicts it is given, so both optimizers share groups; and the state, so that a checkpoint sees it.
        self._adamw = torch.optim.AdamW([g for g in self.param_groups if not g["muon"]], betas=config.betas)
        self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closures
        self._adamw.step()
        for group in (g for g in self.param_groups if g["muon"]):
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                buffer = state["momentum_buffer"]
                buffer.lerp_(parameter.grad, 1 - self.momentum)
                update = orthogonalize(parameter.grad.lerp(buffer, self.momentum))
                scale = RMS * math.sqrt(max(parameter.shape[-2:]))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * scale)


def orthogonalize(matrix: Tensor) -> Tensor:
    """About U Vᵀ of each matrix U S Vᵀ [*, N, K]: singular values end between 0.7 and 1.2. bfloat16, as published."""
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16().reshape(-1, *matrix.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPSILON)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrix.shape)
