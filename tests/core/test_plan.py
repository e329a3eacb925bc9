"""Plans: numbers against arithmetic done by hand, and refusals before anything is loaded."""

import math

import pytest

from qarl.errors import ConfigError
from qarl.plan import engine_memory, engine_weights, learner_memory, plan, staging
from qarl.shapes import architecture, parameter_shapes

TARGET = "recipe=qwen3_30b_a3b_math_w4a16"


def shapes(config):
    found = architecture(config.model)
    assert found is not None
    return parameter_shapes(found)


def test_the_target_is_thirty_billion_weights_and_seventeen_gigabytes_at_int4(composed):
    config = composed(TARGET)
    total = 2 * 151936 * 2048 + 2048  # embeddings, head, final norm
    attention = 2048 * (4096 + 512 + 512) + 4096 * 2048 + 2 * 128
    experts = 128 * 3 * 768 * 2048
    total += 48 * (attention + experts + 128 * 2048 + 2 * 2048)
    memory = learner_memory(config, shapes(config))
    assert memory.weights == pytest.approx(2 * total / 8 / 1e9)
    quantized = 48 * (attention - 256 + experts)
    assert engine_weights(config, shapes(config)) == pytest.approx(
        (quantized * (4 + 16 / 128) / 8 + 2 * (total - quantized)) / 1e9
    )
    assert 16 < engine_weights(config, shapes(config)) < 18


@pytest.mark.parametrize(
    "dtype, zero, divided",
    [
        ("float32", 1, ("moments",)),
        ("float32", 2, ("gradients",)),
        ("bfloat16", 2, ("gradients",)),
        ("bfloat16", 3, ("weights",)),
    ],
)
def test_each_zero_stage_divides_one_part_more(composed, dtype, zero, divided):
    config, below = (
        composed(TARGET, f"model.dtype={dtype}", f"learner.zero={zero}"),
        composed(TARGET, f"model.dtype={dtype}", f"learner.zero={zero - 1}"),
    )
    memory, before = learner_memory(config, shapes(config)), learner_memory(below, shapes(config))
    for part in ("weights", "gradients", "moments"):
        ratio = 8 if part in divided else 1
        assert getattr(before, part) == pytest.approx(ratio * getattr(memory, part))


def test_a_learner_on_one_gpu_holds_the_bytes_a_weight_that_were_measured(composed):
    """24.03 at the peak of an optimizer step, ZeRO-1 on one H200, of two models (benchmarks/results/learner_h200.json)."""
    config = composed("recipe=quickstart_gpu", "rollout.format=bf16")
    memory, weights = learner_memory(config, shapes(config)), sum(map(math.prod, shapes(config).values()))
    held = memory.weights + memory.gradients + memory.masters + memory.moments + memory.step
    assert held * 1e9 / weights == pytest.approx(24.03, rel=0.005)


@pytest.mark.parametrize("zero, copies", [(0, 0), (1, 1), (3, 1)])
def test_deepspeed_keeps_masters_of_float32_weights_too(composed, zero, copies):
    config = composed("recipe=quickstart", f"learner.zero={zero}")
    memory = learner_memory(config, shapes(config))
    assert memory.masters == pytest.approx(copies * memory.weights)


def test_a_plan_says_whether_it_fits(composed):
    assert "left for activations" in plan(composed(TARGET))
    assert "DOES NOT FIT" in plan(composed(TARGET, "placement.gpu_gb=40"))
    assert "in host memory" in plan(composed("recipe=quickstart"))


def test_a_plan_says_where_the_engines_weights_are_more_than_its_share(composed):
    assert "DOES NOT FIT: rollout.gpu_memory is 11.7 too little" in plan(composed(TARGET, "rollout.format=bf16"))


def test_a_plan_says_how_weights_travel_and_what_it_leaves_out(composed):
    text = plan(composed(TARGET))
    assert "GB on the wire (61.1 as BF16)\n      read in place by engines that share a rank's GPU" in text
    assert "not counted: start-up" in text
    split = ("placement.mode=split", "placement.gpus=16")
    assert "broadcast by NCCL" in plan(composed(TARGET, *split))
    assert "all of it passes through host memory" in plan(composed("recipe=quickstart"))


def test_staging_is_two_buffers_of_the_largest_module_of_the_engine(composed):
    """Of this model at int4 the embedding, 151936 x 2048 in bfloat16; at bf16 the 128 experts of a layer, w13 and w2."""
    config = composed(TARGET)
    assert staging(config, shapes(config)) == pytest.approx(2 * 151936 * 2048 * 2 / 1e9)
    config = composed(TARGET, "rollout.format=bf16")
    assert staging(config, shapes(config)) == pytest.approx(2 * 128 * 3 * 768 * 2048 * 2 / 1e9)


def test_the_cache_of_an_engine_is_what_was_asked_for_or_what_its_share_leaves(composed):
    asked = composed("recipe=quickstart_gpu", "rollout.kv_cache_gb=2")
    assert engine_memory(asked, shapes(asked)).kv_cache == 2
    shared = composed("recipe=quickstart_gpu")
    assert engine_memory(shared, shapes(shared)).kv_cache == pytest.approx(
        0.3 * 141 - engine_weights(shared, shapes(shared))
    )
    cpu = composed("recipe=quickstart", "rollout.kv_cache_gb=null")
    assert engine_memory(cpu, shapes(cpu)).kv_cache == 1


def test_a_group_that_does_not_fit_the_architecture_is_refused(composed):
    with pytest.raises(ConfigError, match="rollout.format: 'w4a16' needs input features divisible by 128"):
        plan(composed("recipe=quickstart", "rollout.format=w4a16", "model.pocket.hidden_size=96"))


def test_below_zero_3_the_learner_keeps_the_codes_it_computes_with(composed):
    def codes(*overrides):
        config = composed(TARGET, *overrides)
        return learner_memory(config, shapes(config)).codes

    whole = 48 * (2048 * (4096 + 512 + 512) + 4096 * 2048 + 128 * 3 * 768 * 2048) * (4 + 16 / 128) / 8 / 1e9
    assert codes("learner.zero=2") - codes() == pytest.approx(whole)
    assert codes("learner.zero=2", "learner.backend=none") == codes()


TWO = ("rollout.tensor_parallel=2", "rollout.replicas=4")


def test_two_ranks_of_an_engine_hold_half_of_its_weights_each(composed):
    one, two = composed(TARGET), composed(TARGET, *TWO)
    assert engine_memory(two, shapes(two)).weights == pytest.approx(engine_memory(one, shapes(one)).weights / 2)
    assert "engine: 4 x vllm, tensor parallel 2" in plan(two)


def test_a_learner_of_two_engine_ranks_keeps_codes_of_summed_products_in_shares_too(composed):
    def codes(*overrides):
        config = composed(TARGET, "learner.zero=2", *overrides)
        return learner_memory(config, shapes(config)).codes

    summed = 48 * (4096 * 2048 + 128 * 768 * 2048) * (4 + 16 / 128) / 8 / 1e9
    assert codes(*TWO) - codes() == pytest.approx(summed)


@pytest.mark.parametrize(
    "changes, why",
    [
        (("model.pocket.heads=3", "model.pocket.kv_heads=1"), "2 ranks cannot share num_attention_heads = 3"),
        (("model.pocket.heads=6", "model.pocket.kv_heads=3"), "2 ranks cannot share num_key_value_heads = 3"),
        (("model.pocket.intermediate_size=257",), "2 ranks cannot share intermediate_size = 257"),
        (
            ("model.pocket.intermediate_size=384", "model.pocket.heads=8", "rollout.format=w4a16"),
            r"2 ranks take 192 of intermediate_size = 384 inputs each, which groups of 128 \(rollout.format=w4a16\)",
        ),
    ],
)
def test_a_model_that_two_ranks_cannot_share_is_refused(composed, changes, why):
    with pytest.raises(ConfigError, match=f"rollout.tensor_parallel: {why}"):
        plan(composed("recipe=quickstart", "rollout.tensor_parallel=2", *changes))


def test_ranks_may_hold_the_same_key_and_value_head(composed):
    assert "tensor parallel 2" in plan(
        composed("recipe=quickstart", "rollout.tensor_parallel=2", "model.pocket.kv_heads=1")
    )
