"""Objectives as data: the special cases, and the checks."""

import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace

import pytest

from qarl.algorithm import Bounds, Correction, Objective, dapo, dr_grpo, dual_clip, grpo, gspo, icepop, tbpo
from qarl.errors import ConfigError


def test_grpo_is_dapo_with_equal_bounds_but_for_the_normaliser():
    assert grpo(0.2) == replace(dapo(low=0.2, high=0.2), normaliser="sequence_mean")


def test_dr_grpo_is_grpo_with_a_constant_normaliser():
    assert dr_grpo(512) == replace(grpo(), normaliser="constant", constant_tokens=512)


def test_gspo_is_grpo_on_the_sequence_ratio():
    assert gspo(low=0.2, high=0.2) == replace(grpo(0.2), ratio="sequence")


def test_tbpo_is_gspo_with_a_ceiling_for_negatives_and_a_sequence_weight():
    correction = Correction(kind="tis", level="sequence", cap=2.0)
    assert tbpo() == replace(gspo(), bounds=Bounds(4e-4, 3e-4, 7e-4), correction=correction)


def test_dual_clip_constant_is_one_plus_negative_high():
    assert dual_clip(0.2, c=3.0).bounds == Bounds(positive_high=0.2, negative_low=0.2, negative_high=2.0)


def test_icepop_is_a_token_mask_with_the_published_defaults():
    assert icepop() == Correction(kind="mis", level="token", cap=5.0, floor=0.5)


def test_objectives_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        tbpo().ratio = "token"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Correction(kind="tis", cap=0.0), "algorithm.objective.correction.cap"),
        (lambda: Correction(kind="tis", cap=math.nan), "algorithm.objective.correction.cap"),
        (lambda: Correction(kind="mis", cap=2.0, floor=3.0), "algorithm.objective.correction.floor"),
        (lambda: Correction(kind="tis", floor=0.5), "algorithm.objective.correction.floor"),
        (lambda: Correction(kind="icepop"), "algorithm.objective.correction.kind"),  # type: ignore[arg-type]
        (lambda: Correction(level="batch"), "algorithm.objective.correction.level"),  # type: ignore[arg-type]
        (lambda: Bounds(-0.1, None, None), "algorithm.objective.bounds.positive_high"),
        (lambda: Bounds(None, 1.5, None), "algorithm.objective.bounds.negative_low"),
        (lambda: Bounds(None, None, 0.0), "algorithm.objective.bounds.negative_high"),
        (lambda: dual_clip(0.2, c=1.0), "algorithm.objective.bounds.negative_high"),
        (lambda: replace(grpo(), kl_coefficient=-1.0), "algorithm.objective.kl_coefficient"),
        (lambda: replace(grpo(), entropy_coefficient=math.inf), "algorithm.objective.entropy_coefficient"),
        (lambda: replace(grpo(), normaliser="constant"), "algorithm.objective.constant_tokens"),
        (lambda: replace(grpo(), constant_tokens=64), "algorithm.objective.constant_tokens"),
        (lambda: replace(grpo(), normaliser="mean"), "algorithm.objective.normaliser"),  # type: ignore[arg-type]
        (lambda: replace(grpo(), ratio="batch"), "algorithm.objective.ratio"),  # type: ignore[arg-type]
        (lambda: replace(grpo(), kl_estimator="k4"), "algorithm.objective.kl_estimator"),  # type: ignore[arg-type]
    ],
)
def test_a_bad_value_is_refused_by_its_dotted_key(make, key):
    with pytest.raises(ConfigError, match=f"^{key}: "):
        make()


def test_an_objective_is_made_without_torch():
    code = "import sys, qarl.algorithm; qarl.algorithm.tbpo(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_field_is_unbounded_or_off_where_grpo_has_nothing_to_say():
    assert grpo() == Objective(
        "token", Bounds(0.2, 0.2, None), "sequence_mean", Correction("none"), 0.0, "k3", 0.0, None
    )
