"""The canary is the policy's own forward, on a GPU as one graph that stays good while weights and codes stay in place."""

from typing import Any

import numpy as np
import pytest
import torch

from qarl import formats
from qarl.batching import pack_to_score
from qarl.trainer.aligned import AlignedModel
from qarl.trainer.canary import Canary
from qarl.trainer.model import load_model
from qarl.trainer.policy import Policy, to_tensors

RNG = np.random.default_rng(0)
SEQUENCES = [RNG.integers(6, 30, n).astype(np.int32) for n in (5, 17, 40)]
OTHERS = [RNG.integers(6, 30, n).astype(np.int32) for n in (9, 30)]


def eager(policy: Policy, batches: Any, device: torch.device) -> list[np.ndarray]:
    with torch.no_grad():
        return [policy(to_tensors(batch, device), 1.0)[0].float().cpu().numpy() for batch in batches]


def check(model: Any, format: str, backend: str, device: torch.device, dtype: torch.dtype) -> None:
    aligned = AlignedModel(model, formats.get(format), backend, device.type, dtype)
    policy = Policy(model, 0.7, 64)
    canary = Canary(policy, aligned, device)
    scores = []
    for sequences in (SEQUENCES, SEQUENCES, OTHERS, SEQUENCES):
        batch, _ = pack_to_score(sequences, 1, 50)
        assert len(batch.ranks[0]) == (2 if sequences is SEQUENCES else 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1 if parameter.ndim > 1 else 1.1)
        aligned.invalidate()
        for name in aligned.covered:
            aligned.codes(name, model.get_parameter(name))  # as a sync publishes them
        found = canary(batch.ranks[0])
        for ours, expected in zip(found, eager(policy, batch.ranks[0], device), strict=True):
            np.testing.assert_array_equal(ours, expected)
        scores.append(np.concatenate(found))
    assert len({score.tobytes() for score in scores}) == 4


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_it_is_the_policys_forward(kind, models):
    model: Any = load_model(models[kind], torch.float32)
    check(model.eval(), "w8a8_int8", "emulated", torch.device("cpu"), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("format", ["bf16", "w4a16", "w8a8_int8", "w8a8_fp8"])
def test_its_graph_is_the_policys_forward_though_weights_change(kind, format, scenarios, tmp_path):
    folder = scenarios.make_model(tmp_path / kind, kind, scenarios.WIDE)
    model: Any = load_model(folder, torch.bfloat16)
    check(model.cuda().eval(), format, "auto", torch.device("cuda", 0), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["w4a16", "w8a8_int8", "w8a8_fp8"])
def test_definitions_which_no_graph_can_hold_are_run_as_they_are(format, scenarios, tmp_path):
    folder = scenarios.make_model(tmp_path / "moe", "moe", scenarios.WIDE)
    model: Any = load_model(folder, torch.bfloat16)
    check(model.cuda().eval(), format, "emulated", torch.device("cuda", 0), torch.bfloat16)
