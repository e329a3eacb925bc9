"""The learner on a GPU: one step, whichever backend computes it and whatever DeepSpeed shards.

Forward passes are deterministic, so log-probs are compared to the bit where the arithmetic is the same. FlashAttention's backward
adds up in any order, in BF16: gradient norms are compared to 1 %.
"""

import numpy as np
import pytest

pytestmark = pytest.mark.gpu

FORMATS = ["w4a16", "w4a16_g32", "w8a8_int8", "w8a8_fp8"]
KINDS = ["dense", "moe"]


@pytest.fixture(scope="session")
def wide(scenarios, tmp_path_factory):
    root = tmp_path_factory.mktemp("wide")
    return {kind: str(scenarios.make_model(root / kind, kind, scenarios.WIDE)) for kind in KINDS}


def run(one_rank, model, **settings):
    return one_rank(**{"model": model, "dtype": "bfloat16", "zero": 1, **settings})


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_step_is_that_of_float32_on_the_same_weights(wide, one_rank, kind):
    ours = run(one_rank, wide[kind])
    reference = one_rank(model=wide[kind], dtype="float32", zero=0)
    assert np.abs(ours["logprobs"] - reference["logprobs"]).mean() < 0.02
    assert ours["grad_norm"] == pytest.approx(reference["grad_norm"], rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", FORMATS)
def test_fused_computes_what_the_definition_says(wide, one_rank, kind, format):
    fused = run(one_rank, wide[kind], format=format, backend="fused")
    emulated = run(one_rank, wide[kind], format=format, backend="emulated")
    unaligned = run(one_rank, wide[kind], format=format, backend="none")
    gap = np.abs(fused["logprobs"] - emulated["logprobs"]).mean()
    far = np.abs(fused["logprobs"] - unaligned["logprobs"]).mean()
    assert far > 1e-3, "the format changes nothing here: the comparison would show nothing"
    if format == "w8a8_int8" or (format in ("w4a16", "w4a16_g32") and kind == "dense"):
        assert gap == 0, gap  # sums of integers; one bfloat16 product of the same dequantized weight
    elif format in ("w4a16", "w4a16_g32"):  # the same weights, summed over an expert's inputs in another order
        assert gap < 0.25 * far, (gap, far)
    else:
        # A tensor core sums e4m3 in fewer bits than float32: a last bit decides here and there which code an activation of
        # the next layer rounds to.
        assert gap < 0.75 * far, (gap, far)
    assert fused["grad_norm"] == pytest.approx(emulated["grad_norm"], rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", ["w4a16", "w8a8_int8", "w8a8_fp8"])
@pytest.mark.parametrize(
    "settings", [{"zero": 3}, {"gradient_checkpointing": True}, {"zero": 3, "gradient_checkpointing": True}]
)
def test_sharding_and_checkpointing_change_nothing(wide, one_rank, kind, format, settings):
    plain = run(one_rank, wide[kind], format=format, backend="fused")
    other = run(one_rank, wide[kind], format=format, backend="fused", **settings)
    assert np.array_equal(plain["logprobs"], other["logprobs"])
    assert other["grad_norm"] == pytest.approx(plain["grad_norm"], rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_auto_names_what_computes_and_takes_a_step(scenarios, wide, kind):
    learner = scenarios.make_learner(wide[kind], format="w8a8_int8", backend="auto", dtype="bfloat16", zero=1)
    assert learner.aligned.backend in ("engine", "fused")
    samples = scenarios.scored(learner, scenarios.make_samples(), 200)
    stats = scenarios.step(learner, samples, 200)
    assert np.isfinite(stats.grad_norm) and stats.grad_norm > 0
