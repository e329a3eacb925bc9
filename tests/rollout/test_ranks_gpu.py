"""An engine of two ranks on two GPUs: every format, dense and experts, refilled while CUDA graphs hold its tensors.

`-k w4a16-wide_moe_of_two` runs one case.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qarl import formats
from qarl.batching import pack_to_score
from qarl.config import RolloutConfig
from qarl.records import Prompt, RefillReport, Sampling
from qarl.trainer.aligned import AlignedModel
from qarl.trainer.model import load_model
from qarl.trainer.policy import Policy, to_tensors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

CASES = [(format, kind) for kind in ("wide", "wide_moe_of_two") for format in formats.FORMATS]
RNG = np.random.default_rng(0)
PROMPTS = [Prompt(i, "", RNG.integers(5, 90, n).astype(np.int32), "") for i, n in enumerate((3, 40, 17, 90))]
SEEDS = np.arange(len(PROMPTS), dtype=np.int64)[:, None]
GREEDY = Sampling(temperature=0, max_tokens=48)


@dataclass
class Rig:
    format: str
    pair: Any
    config: RolloutConfig
    folder: Path
    model: Any
    """seed -> the policy, bfloat16."""
    published: Any
    version: int = 0

    def open(self, how: str, folder: Path) -> None:
        contracts = self.pair.open(how, self.config, folder, "bfloat16")
        assert not any(isinstance(contract, Exception) for contract in contracts), contracts

    def refill(self, seed: int) -> list[RefillReport]:
        self.version += 1
        update = self.published(self.model(seed), self.format, self.version)
        reports = self.pair("refill", update, [PROMPTS[1].tokens])
        assert all(report.contract_hash == update.contract_hash for report in reports)
        np.testing.assert_array_equal(reports[0].canaries[0], reports[1].canaries[0])
        return reports

    def greedy(self) -> list[list[int]]:
        one, other = self.pair("generate", PROMPTS, GREEDY, SEEDS)
        said = [c.tokens.tolist() for c in one]
        assert said == [c.tokens.tolist() for c in other]
        return said


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def rig(request, pair, model_folder, weights, published) -> Iterator[Rig]:
    format, kind = request.param
    config = RolloutConfig(format=format, gpu_memory=0.1, max_sequences=8, tensor_parallel=2)
    folder = model_folder(kind)
    made = Rig(format, pair, config, folder, lambda seed: weights(kind, seed).to(torch.bfloat16), published)
    made.open("refilled", folder)
    yield made
    pair("close")


def test_a_refill_writes_in_place_and_keeps_every_address(rig: Rig):
    assert max(report.max_tile_error for report in rig.refill(1)) <= 0.01
    before = rig.pair("addresses")
    assert rig.pair("foreign") == [[], []] and all(len(of_rank) > 10 for of_rank in before)
    assert max(report.max_tile_error for report in rig.refill(2)) <= 0.01
    assert rig.pair("addresses") == before


def test_other_weights_answer_otherwise_and_going_back_restores_the_answers(rig: Rig):
    said = []
    for seed in (1, 2, 1):
        rig.refill(seed)
        said.append(rig.greedy())
    assert said[0] == said[2] != said[1]


def test_a_learner_told_of_two_ranks_is_closer_than_one_that_is_not(rig: Rig):
    """Where each rank rounds its inputs by itself. What is left is the head, whose product ranks cut by words."""
    if formats.get(rig.format).activation == "none":
        pytest.skip("inputs are not quantized: a rank's sum differs in its last bits alone")
    rig.refill(1)
    sequences = [prompt.tokens for prompt in PROMPTS]
    served = np.concatenate(rig.pair("score", sequences, [1] * len(sequences))[0])
    device, gaps = torch.device("cuda", 0), {}
    for ranks in (1, 2):
        model: Any = load_model(rig.folder, torch.bfloat16)
        model.load_state_dict(rig.model(1).state_dict())
        AlignedModel(model.to(device), formats.get(rig.format), "auto", "cuda", torch.bfloat16, ranks)
        batch, order = pack_to_score(sequences, 1, 4096)
        with torch.no_grad():
            logprobs, _ = Policy(model, 1.0, 512)(to_tensors(batch.ranks[0][0], device))
        mine = np.concatenate(order.unpack([[logprobs.float().cpu().numpy()]]))
        gaps[ranks] = float(np.abs(mine - served).mean())
    assert gaps[2] < 0.02 and gaps[2] < gaps[1] / 2, gaps


def test_it_serves_what_vllm_serves_that_read_a_checkpoint(rig: Rig, exported, tmp_path):
    """Last of a case: the engine is closed, and one of two ranks opened that vLLM's own loaders filled."""
    rig.refill(2)
    rig.refill(3)
    refilled, held = rig.greedy(), rig.pair("bytes_held")
    rig.pair("close")
    rig.open("stock", exported(rig.model(3), rig.format, rig.folder, tmp_path))
    assert rig.pair("bytes_held") == held
    assert rig.greedy() == refilled
    assert len({tuple(tokens) for tokens in refilled}) > 1
