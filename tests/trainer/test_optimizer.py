"""Schedules, and Muon against torch's own."""

import copy

import pytest
import torch
from torch import nn

from qarl.config import OptimizerConfig
from qarl.trainer.muon import Muon, orthogonalize
from qarl.trainer.optimizer import lr_at, make_optimizer


def rates(total=10, **settings):
    return [lr_at(step, OptimizerConfig(lr=1.0, **settings), total) for step in range(total)]


def test_constant_schedule_warms_up_linearly():
    assert rates(warmup=4) == pytest.approx([0.25, 0.5, 0.75, 1.0] + [1.0] * 6)


def test_linear_schedule_ends_at_its_floor_with_the_last_step():
    assert rates(schedule="linear", min_lr_ratio=0.1) == pytest.approx([1 - 0.09 * (i + 1) for i in range(10)])


def test_cosine_schedule_is_transformers_own():
    from transformers import get_cosine_with_min_lr_schedule_with_warmup

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 2, 10, min_lr_rate=0.1)
    expected = []
    for _ in range(10):
        optimizer.step()
        theirs.step()  # theirs starts at 0; ours is one step ahead, so that the first step is not lost
        expected.append(optimizer.param_groups[0]["lr"])
    assert rates(schedule="cosine", min_lr_ratio=0.1, warmup=2) == pytest.approx(expected)


def test_schedule_stays_at_its_floor_beyond_the_end():
    config = OptimizerConfig(lr=2.0, schedule="cosine", min_lr_ratio=0.25)
    assert lr_at(50, config, 10) == pytest.approx(0.5)


def make_module():
    torch.manual_seed(0)
    module = nn.Module()
    for name, (n, k) in {"wide": (8, 20), "tall": (30, 8), "lm_head": (9, 8)}.items():
        module.register_module(name, nn.Linear(k, n, bias=name == "tall"))
    return module


def test_muon_equals_torch_muon_on_matrices_and_adamw_on_the_rest():
    config = OptimizerConfig(lr=0.01, weight_decay=0.1)
    ours, theirs = make_module(), make_module()
    optimizer = Muon(ours.named_parameters(), config)
    muon = torch.optim.Muon(
        [theirs.wide.weight, theirs.tall.weight],
        lr=config.lr,
        weight_decay=0.1,
        momentum=config.muon_momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    adamw = torch.optim.AdamW(
        [{"params": [theirs.lm_head.weight], "weight_decay": 0.1}, {"params": [theirs.tall.bias], "weight_decay": 0.0}],
        lr=config.lr,
        betas=config.betas,
    )
    for step in range(3):
        for group in [*optimizer.param_groups, *muon.param_groups, *adamw.param_groups]:
            group["lr"] = 0.01 * (step + 1)  # the schedule reaches both halves
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(step))
            b.grad = a.grad.clone()
        for each in (optimizer, muon, adamw):
            each.step()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-3 * b.abs().max().item()), (
            name
        )  # bfloat16 products, summed in another order


def test_muon_treats_every_packed_expert_as_a_matrix():
    stacked = torch.randn(3, 6, 10)
    one_by_one = torch.stack([orthogonalize(matrix) for matrix in stacked])
    assert torch.allclose(orthogonalize(stacked).float(), one_by_one.float(), atol=0.02)
    singular = torch.linalg.svdvals(orthogonalize(stacked).float())
    assert 0.6 < singular.min() and singular.max() < 1.3


def test_muon_of_no_gradient_is_no_step():
    module = make_module()
    before = copy.deepcopy(module.state_dict())
    optimizer = Muon(module.named_parameters(), OptimizerConfig(lr=0.01))
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_weight_decay_spares_norms_and_biases():
    groups = make_optimizer(make_module().named_parameters(), OptimizerConfig(weight_decay=0.1)).param_groups
    assert {group["weight_decay"]: {p.ndim for p in group["params"]} for group in groups} == {0.1: {2}, 0.0: {1}}
