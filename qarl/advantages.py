"""Advantages from the rewards of a group: P prompts × G responses to each.

All compute in float64, and centre on the group's first reward before its mean, so that equal rewards give exactly 0
(the float mean of three 0.1 is not 0.1; a remainder divided by its own deviation would be noise of size 1).
"""

import torch
from torch import Tensor

from qarl.algorithm import AdvantageKind

STD_EPSILON = 1e-6  # as in verl; only matters where rewards of a group differ by less than about 1e-5


def group_relative(rewards: Tensor, *, divide_by_std: bool) -> Tensor:
    """Reward minus the group's mean, [P, G] -> [P, G] float32.

    divide_by_std: also divided by (sample deviation + STD_EPSILON), GRPO (arXiv 2402.03300; n - 1 as in TRL and verl).
    Without: Dr. GRPO (arXiv 2503.20783). A group of one, or of equal rewards, gives exactly 0.
    Raises ValueError at a reward that is not finite.
    """
    centred = _centred(rewards)
    if divide_by_std and rewards.shape[1] > 1:
        std = (centred.square().sum(dim=1, keepdim=True) / (rewards.shape[1] - 1)).sqrt()
        centred = centred / (std + STD_EPSILON)
    return centred.float()


def leave_one_out(rewards: Tensor) -> Tensor:
    """RLOO (arXiv 2402.14740): reward minus the mean of the group's OTHER rewards, [P, G] -> [P, G] float32.

    A group of one has no others: 0. Raises ValueError at a reward that is not finite.
    """
    group = rewards.shape[1] if rewards.ndim == 2 else 0
    return (_centred(rewards) * (group / max(group - 1, 1))).float()  # r - (S - r)/(G - 1) = (r - S/G) G/(G - 1)


def advantages(rewards: Tensor, kind: AdvantageKind) -> Tensor:
    """[P, G] -> [P, G] float32: "grpo" (mean and deviation), "dr_grpo" (mean alone) or "rloo" (leave one out)."""
    match kind:
        case "grpo":
            return group_relative(rewards, divide_by_std=True)
        case "dr_grpo":
            return group_relative(rewards, divide_by_std=False)
        case "rloo":
            return leave_one_out(rewards)
    raise ValueError(f"advantage: {kind!r} is not one of ['grpo', 'dr_grpo', 'rloo']")


def advantages_of_known(rewards: Tensor, known: Tensor, kind: AdvantageKind) -> Tensor:
    """`advantages` of the responses whose rewards are known, [P, G] bool, within groups of these alone; 0 of the others.

    The others teach nothing, and neither raise nor lower what a response is compared with.
    """
    gained = torch.zeros(rewards.shape, dtype=torch.float32)
    for row, of_group in enumerate(known):
        if of_group.any():
            gained[row, of_group] = advantages(rewards[row, of_group][None], kind)[0]
    return gained


def _centred(rewards: Tensor) -> Tensor:
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be [prompts, group], got shape {list(rewards.shape)}")
    bad = (~torch.isfinite(rewards)).nonzero()
    if len(bad):
        prompt, member = bad[0].tolist()
        raise ValueError(f"rewards[{prompt}, {member}] is {rewards[prompt, member].item()}; {len(bad)} are not finite")
    shifted = rewards.double() - rewards[:, :1].double()
    return shifted - shifted.mean(dim=1, keepdim=True)
