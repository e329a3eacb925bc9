"""What went wrong silently in other frameworks' weight syncs, and where it is tested here, or why it cannot happen."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: pitfall -> "file::test", or a sentence
PITFALLS = {
    "sampler and learner quantize different copies": (
        "tests/trainer/test_learner.py::test_codes_follow_the_weights_after_every_update"
    ),
    "another scale convention or group size": (
        "tests/rollout/test_engine_contract.py::test_another_group_size_is_a_contract_mismatch"
    ),
    "packed experts are left out": "tests/trainer/test_publish.py::test_contract_is_that_of_the_fused_tensors",
    "fused q, k, v and gate, up share a scale that the parts do not": (
        "tests/trainer/test_publish.py::test_codes_of_fused_tensors_are_codes_of_the_stacked_weights"
    ),
    "router, lm_head or norms are quantized by accident": (
        "tests/trainer/test_publish.py::test_everything_else_is_published_as_it_is"
    ),
    "post-load processing is left out, or done twice": (
        "tests/rollout/test_engine_contract.py::test_refills_in_a_row_change_what_is_said_and_going_back_restores_it"
    ),
    "storage moves under CUDA graphs": (
        "tests/rollout/test_engine_gpu.py::test_a_refill_serves_what_was_published_at_the_addresses_it_had"
    ),
    "one of two tied parameters is refreshed": (  # of its cases, qwen3 ties its embeddings
        "tests/rollout/test_engine_contract.py::test_a_fresh_engine_refuses_and_once_refilled_equals_one_refilled_often"
    ),
    "a tensor that comes in part, or not at all, leaves its layer stale": (
        "tests/rollout/test_engine_contract.py::test_missing_and_unexpected_tensors_are_named"
    ),
    "a layer is not written": (
        "tests/rollout/test_engine_contract.py::test_weights_that_were_not_really_loaded_are_found_by_the_tiles"
    ),
    "a buffer is written again while it is read": (
        "tests/core/test_transfer.py::test_versions_arrive_whole_at_every_engine_however_slow_it_reads"
    ),
    "the order of arrival fills memory with half-loaded layers": (
        "tests/core/test_transfer.py::test_a_plan_holds_every_part_once_in_order_and_modules_whole"
    ),
    "index tensors are stale after sleep": (
        "tests/rollout/test_engine_gpu.py::test_a_sleeping_engine_gives_its_memory_back_and_answers_as_before_once_refilled"
    ),
    "prefixes cached under old weights are reused": (  # it asks the same prompts after each refill
        "tests/rollout/test_engine_contract.py::test_refills_in_a_row_change_what_is_said_and_going_back_restores_it"
    ),
    "an engine that slept generates before all weights are back": (
        "tests/rollout/test_engine_gpu.py::test_a_sleeping_engine_gives_its_memory_back_and_answers_as_before_once_refilled"
    ),
    "scales of a quantized KV cache are not reloaded": "The KV cache is not quantized: no format has such scales.",
}


@pytest.mark.parametrize("pitfall", PITFALLS)
def test_it_is_tested_or_said_why_it_cannot_happen(pitfall: str):
    where, found, name = PITFALLS[pitfall].partition("::")
    if found:
        assert f"def {name}(" in (ROOT / where).read_text()
    else:
        assert where.endswith(".")
