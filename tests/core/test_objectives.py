"""Every objective against its published form, written independently on padded [B, L] tensors, values and gradients.

Tolerances: the module computes in float64 from the inputs it is given, so that on float64 inputs it differs from
another float64 computation by summation order alone (`assert_exact`). On float32 inputs the results are rounded once
more, to float32 (`assert_rounded`).
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qarl.algorithm import Bounds, Correction, Objective, dapo, dr_grpo, dual_clip, grpo, gspo, icepop, tbpo
from qarl.objectives import SUMS, combine, finalize, kl_estimate, surrogate

REINFORCE = Objective(ratio="token", bounds=Bounds(None, None, None), normaliser="token_mean")
OBJECTIVES = {
    "reinforce": REINFORCE,
    "grpo": grpo(),
    "dr_grpo": dr_grpo(constant_tokens=50),
    "dapo": dapo(),
    "dual_clip": dual_clip(0.2, c=1.25),
    "gspo": gspo(0.03, 0.04),
    "gspo_token_mean": replace(gspo(0.03, 0.04), normaliser="token_mean"),
    "tbpo": tbpo(0.04, 0.03, 0.07, cap=1.1),
    "grpo_tis": replace(grpo(), correction=Correction("tis", "token", 1.2)),
    "grpo_icepop": replace(grpo(), correction=icepop(0.8, 1.2)),
    "gspo_mis": replace(gspo(0.03, 0.04), correction=Correction("mis", "sequence", 1.1, 0.9)),
    "gspo_tis_sum": replace(gspo(0.03, 0.04), correction=Correction("tis", "sequence_sum", 2.0)),
}


def assert_exact(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-15)


def assert_rounded(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-12)


@dataclass(frozen=True)
class Batch:
    """B responses, packed; `lengths` may hold zeros."""

    logprobs: Tensor
    old: Tensor
    sampler: Tensor
    advantages: Tensor
    lengths: tuple[int, ...]

    @property
    def sequence(self) -> Tensor:
        return torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths, dtype=torch.int64))

    def take(self, order: list[int]) -> "Batch":
        """The responses of these numbers, in this order."""
        index = torch.cat([torch.zeros(0, dtype=torch.int64), *((self.sequence == i).nonzero()[:, 0] for i in order)])
        logprobs, old, sampler = self.logprobs[index], self.old[index], self.sampler[index]
        return Batch(logprobs, old, sampler, self.advantages[order], tuple(self.lengths[i] for i in order))


def make_batch(lengths=(5, 1, 9, 3, 7, 2), *, seed=0, step=0.15, gap=0.15, dtype=torch.float64) -> Batch:
    """Ratios of both signs of advantage fall inside and outside every bound of OBJECTIVES (asserted below)."""
    random = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    shift = torch.repeat_interleave(
        torch.randn(len(lengths), generator=random, dtype=torch.float64), torch.tensor(lengths, dtype=torch.int64)
    )
    old = -torch.rand(n, generator=random, dtype=torch.float64) * 3
    logprobs = old + step * (shift + torch.randn(n, generator=random, dtype=torch.float64))
    sampler = old + gap * torch.randn(n, generator=random, dtype=torch.float64)
    advantages = torch.randn(len(lengths), generator=random, dtype=torch.float64)
    return Batch(logprobs.to(dtype), old.to(dtype), sampler.to(dtype), advantages.to(dtype), lengths)


def run(batch: Batch, objective: Objective, *, totals: tuple[int, int] | None = None, **extra):
    """Loss, gradient of the log-probs, sums."""
    logprobs = batch.logprobs.clone().requires_grad_()
    lengths = [n for n in batch.lengths if n]
    sequences, tokens = totals or (len(lengths), sum(lengths))
    loss, sums = surrogate(
        logprobs,
        old_logprobs=batch.old,
        sampler_logprobs=batch.sampler,
        advantages=batch.advantages,
        sequence=batch.sequence,
        n_sequences=len(batch.lengths),
        batch_sequences=sequences,
        batch_tokens=tokens,
        objective=objective,
        **extra,
    )
    loss.backward()
    assert logprobs.grad is not None
    return loss.detach(), logprobs.grad, sums


# The published forms, on padded tensors


def pad(values: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(values.split(list(lengths))), batch_first=True)


def published_ratio(log_ratio: Tensor, mask: Tensor, level: str) -> Tensor:
    if level == "token":
        return log_ratio.exp()
    total = (log_ratio * mask).sum(-1, keepdim=True)
    mean = total / mask.sum(-1, keepdim=True)
    return (mean if level == "sequence" else total).exp().expand_as(log_ratio)


def published_weight(log_ratio: Tensor, mask: Tensor, correction: Correction) -> Tensor:
    w = published_ratio(log_ratio, mask, correction.level)
    if correction.kind == "none":
        return torch.ones_like(w)
    if correction.kind == "tis":
        return torch.minimum(w, torch.tensor(correction.cap, dtype=w.dtype))
    return w * ((w >= correction.floor) & (w <= correction.cap))


def published_clip(r: Tensor, A: Tensor, bounds: Bounds) -> Tensor:
    """PPO's min form, and dual clip's max with c A (arXiv 1912.09729)."""
    low = 1 - bounds.negative_low if bounds.negative_low is not None else -math.inf
    high = 1 + bounds.positive_high if bounds.positive_high is not None else math.inf
    surrogate_PPO = torch.min(r * A, r.clamp(low, high) * A)
    if bounds.negative_high is None:
        return surrogate_PPO
    return torch.where(A < 0, torch.max(surrogate_PPO, (1 + bounds.negative_high) * A), surrogate_PPO)


def published_mean(terms: Tensor, mask: Tensor, objective: Objective) -> Tensor:
    terms = terms * mask
    if objective.normaliser == "token_mean":
        return terms.sum() / mask.sum()
    if objective.normaliser == "sequence_mean":
        return (terms.sum(-1) / mask.sum(-1)).mean()
    assert objective.constant_tokens is not None
    return (terms.sum(-1) / objective.constant_tokens).mean()


def published(batch: Batch, objective: Objective) -> tuple[Tensor, Tensor]:
    logprobs = batch.logprobs.double().clone().requires_grad_()
    mask = pad(torch.ones_like(logprobs), batch.lengths)
    current, old, sampler = (pad(v.double(), batch.lengths) for v in (logprobs, batch.old, batch.sampler))
    A = batch.advantages.double()[:, None].expand_as(mask)
    r = published_ratio(current - old, mask, objective.ratio)
    weight = published_weight(old - sampler, mask, objective.correction)
    loss = -published_mean(weight * published_clip(r, A, objective.bounds), mask, objective)
    (grad,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), grad


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradient_equal_the_published_form_on_a_padded_batch(name, seed):
    batch = make_batch(seed=seed)
    loss, grad, _ = run(batch, OBJECTIVES[name])
    expected_loss, expected_grad = published(batch, OBJECTIVES[name])
    assert_exact(loss, expected_loss)
    assert_exact(grad, expected_grad)


def test_those_batches_meet_every_bound():
    for name, bounded in {"dual_clip": 3, "tbpo": 3, "grpo": 2, "gspo": 2}.items():
        metrics = finalize(combine([run(make_batch(seed=seed), OBJECTIVES[name])[2] for seed in range(4)]))
        fractions = [metrics[f"clip/{side}"] for side in ("positive_high", "negative_low", "negative_high")[:bounded]]
        assert all(0 < fraction < 1 for fraction in fractions), (name, fractions)


@pytest.mark.parametrize("name", ["grpo", "tbpo"])
def test_float32_inputs_lose_nothing_but_the_rounding_of_the_result(name):
    objective = {"grpo": grpo(), "tbpo": tbpo()}[name]
    batch = make_batch((4000, 1, 2500), step=3e-4, dtype=torch.float32)  # bands of 3e-4 over thousands of tokens
    loss, grad, _ = run(batch, objective)
    expected_loss, expected_grad = published(batch, objective)
    assert loss.dtype == grad.dtype == torch.float32
    assert_rounded(loss.double(), expected_loss)
    assert_rounded(grad.double(), expected_grad)


def test_tbpo_gradient_equals_the_formula_token_by_token():
    batch = make_batch((8, 8, 8, 8, 8), step=4e-4, seed=3)
    expected = []
    for i in range(5):
        own = slice(8 * i, 8 * i + 8)
        r = math.exp(math.fsum((batch.logprobs - batch.old)[own].tolist()) / 8)
        w = min(math.exp(math.fsum((batch.old - batch.sampler)[own].tolist()) / 8), 2.0)
        A = batch.advantages[i].item()
        inside = r <= 1 + 4e-4 if A >= 0 else 1 - 3e-4 <= r <= 1 + 7e-4
        expected += [-w * r * A / 8 / 5 * inside] * 8  # d/dlogprob_t of -(1/5) w r A, with dr/dlogprob_t = r/8
    grad = run(batch, tbpo())[1]
    assert 0 < sum(g == 0 for g in expected) < 40
    assert_exact(grad, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("normaliser", ["token_mean", "sequence_mean", "constant"])
def test_gradcheck_with_kl_and_entropy(estimator, ratio, normaliser):
    batch = make_batch((3, 0, 2))
    objective = Objective(
        ratio,
        Bounds(2.0, 0.9, 3.0),
        normaliser,
        icepop(),
        0.3,
        estimator,
        entropy_coefficient=0.1,
        constant_tokens=4 if normaliser == "constant" else None,
    )

    def loss(logprobs: Tensor, entropies: Tensor) -> Tensor:
        return surrogate(
            logprobs,
            old_logprobs=batch.old,
            sampler_logprobs=batch.sampler,
            advantages=batch.advantages,
            sequence=batch.sequence,
            n_sequences=3,
            batch_sequences=2,
            batch_tokens=5,
            objective=objective,
            reference_logprobs=batch.old - 0.5,
            entropies=entropies,
        )[0]

    entropies = torch.rand(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (batch.logprobs.clone().requires_grad_(), entropies))


# Identities


@pytest.mark.parametrize("seed", range(4))
def test_tbpo_for_negative_advantages_is_dual_clip_on_the_gspo_ratio(seed):
    batch = make_batch(step=5e-4, seed=seed)
    batch = replace(batch, sampler=batch.old, advantages=-batch.advantages.abs())  # no mismatch: w = 1
    dual_clip_on_gspo = replace(dual_clip(3e-4, c=1 + 7e-4), ratio="sequence")
    loss, grad, _ = run(batch, tbpo())
    expected_loss, expected_grad, _ = run(batch, dual_clip_on_gspo)
    assert_exact(loss, expected_loss)  # not bit for bit: (1 + 7e-4) - 1 is not 7e-4
    assert_exact(grad, expected_grad)


def test_tbpo_for_positive_advantages_without_mismatch_is_gspo_exactly():
    batch = make_batch(step=5e-4)
    batch = replace(batch, sampler=batch.old, advantages=batch.advantages.abs())
    for actual, expected in zip(run(batch, tbpo())[:2], run(batch, gspo())[:2], strict=True):
        assert torch.equal(actual, expected)


def test_grpo_is_dapo_with_equal_bounds_exactly():
    batch = make_batch()
    same_normaliser = replace(grpo(0.2), normaliser="token_mean")
    for actual, expected in zip(run(batch, same_normaliser)[:2], run(batch, dapo(0.2, 0.2))[:2], strict=True):
        assert torch.equal(actual, expected)


def test_gspo_gradient_equals_its_token_form():
    """GSPO-token (arXiv 2507.18071, section 4.3): s_it = sg[s_i] pi_t / sg[pi_t], the same for a constant advantage."""
    batch = make_batch()
    mask = pad(torch.ones_like(batch.old), batch.lengths)
    logprobs = batch.logprobs.clone().requires_grad_()
    current = pad(logprobs, batch.lengths)
    s = published_ratio(current - pad(batch.old, batch.lengths), mask, "sequence").detach()
    s_token = s * (current - current.detach()).exp()
    A = batch.advantages[:, None].expand_as(mask)
    terms = torch.min(s_token * A, s_token.clamp(1 - 0.03, 1 + 0.04) * A)
    (expected,) = torch.autograd.grad(-published_mean(terms, mask, gspo()), logprobs)
    assert_exact(run(batch, gspo(0.03, 0.04))[1], expected)


@pytest.mark.parametrize(
    ("advantage", "ratio", "inside"),
    [
        (1.0, 1 + 3.9e-4, True),
        (1.0, 1 + 4.1e-4, False),
        (1.0, 0.5, True),
        (-1.0, 1 + 6.9e-4, True),
        (-1.0, 1 + 7.1e-4, False),
        (-1.0, 1 - 2.9e-4, True),
        (-1.0, 1 - 3.1e-4, False),
        (-1.0, 1e30, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tbpo_gradient_outside_its_band_is_exactly_zero(advantage, ratio, inside, dtype):
    old = torch.full((64,), -0.7, dtype=torch.float64)
    advantages = torch.tensor([advantage], dtype=dtype)
    batch = Batch((old + math.log(ratio)).to(dtype), old.to(dtype), old.to(dtype), advantages, (64,))
    grad = run(batch, tbpo())[1]
    assert (grad != 0).all() if inside else (grad == 0).all()


def test_a_response_outside_the_band_leaves_the_others_as_they_are():
    batch = make_batch((6, 6), step=0.0)
    alone = run(batch.take([1]), tbpo(), totals=(2, 12))[1]
    pushed = replace(
        batch, logprobs=batch.logprobs + torch.tensor([0.1] * 6 + [0.0] * 6), advantages=-batch.advantages.abs()
    )
    sign = torch.sign(pushed.advantages[1] * batch.advantages[1])
    assert torch.equal(run(pushed, tbpo())[1], torch.cat([torch.zeros(6, dtype=torch.float64), alone * sign]))


def test_with_one_update_per_rollout_every_band_is_inert():
    batch = make_batch(step=0.0)
    unclipped = replace(tbpo(cap=1.1), bounds=Bounds(None, None, None))
    loss, grad, sums = run(batch, tbpo(cap=1.1))
    expected_loss, expected_grad, _ = run(batch, unclipped)
    assert torch.equal(loss, expected_loss) and torch.equal(grad, expected_grad)
    # ... and that is REINFORCE with the weight: d/dlogprob_t of -(1/B)(1/L_i) sum_t w~_i A_i logprob_t
    log_w = torch.stack([part.mean() for part in (batch.old - batch.sampler).split(list(batch.lengths))])
    per_response = -log_w.exp().clamp(max=1.1) * batch.advantages / torch.tensor(batch.lengths) / len(batch.lengths)
    assert_exact(grad, per_response[batch.sequence])
    metrics = finalize(combine([sums]))
    assert metrics["clip/positive_high"] == metrics["clip/negative_low"] == metrics["clip/negative_high"] == 0
    assert metrics["objective/ratio_mean"] == pytest.approx(1, rel=1e-15)


# Splitting, order


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=8),
    order=st.randoms(use_true_random=False),
    cut=st.integers(0, 8),
    name=st.sampled_from(sorted(OBJECTIVES)),
)
def test_micro_batches_in_any_order_add_up_to_the_whole_batch(lengths, order, cut, name):
    objective = OBJECTIVES[name]
    batch = make_batch(tuple(lengths))
    totals = (sum(n > 0 for n in lengths), sum(lengths))
    permutation = list(range(len(lengths)))
    order.shuffle(permutation)
    parts = [permutation[:cut], permutation[cut:]]
    loss, grad, sums = run(batch, objective)
    results = [run(batch.take(part), objective, totals=totals) for part in parts]
    assert_exact(results[0][0] + results[1][0], loss)
    grads = [grad[batch.sequence == i] for part in parts for i in part]
    assert_exact(torch.cat([results[0][1], results[1][1]]), torch.cat(grads))
    assert combine([results[0][2], results[1][2]]) == pytest.approx(combine([sums]), rel=1e-11, abs=1e-13)


# Hostile values


def same_but_for_the_dropped(batch: Batch, dropped: int, objective: Objective, **extra) -> None:
    """Response `dropped` counts as absent: loss, gradients and every sum but `dropped` are those of the others.

    Gradients to the last bit; sums of other lengths are added in another order.
    """
    others = [i for i in range(len(batch.lengths)) if i != dropped]
    rest = batch.take(others)
    totals = (len(others), sum(rest.lengths))
    loss, grad, sums = run(batch, objective, totals=totals, **extra)
    keep = batch.sequence != dropped
    expected_loss, expected_grad, expected = run(
        rest, objective, totals=totals, **{k: v[keep] for k, v in extra.items()}
    )
    assert_exact(loss, expected_loss)
    assert torch.equal(grad[keep], expected_grad) and (grad[~keep] == 0).all()
    assert combine([sums]) == pytest.approx({**combine([expected]), "dropped": 1.0}, rel=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("which", ["old", "sampler", "sampler, current too"])
def test_a_response_with_a_non_finite_constant_is_dropped_and_counted(name, bad, which):
    batch = make_batch()
    for tensor in {"old": [batch.old], "sampler": [batch.sampler]}.get(which, [batch.sampler, batch.logprobs]):
        tensor[8] = bad  # one token of response 2
    same_but_for_the_dropped(batch, 2, OBJECTIVES[name])


def test_a_dropped_response_takes_its_penalties_with_it():
    batch = make_batch()
    batch.sampler[8] = -math.inf
    reference, entropies = batch.old - 0.1, torch.rand(27, dtype=torch.float64)
    reference[8] = entropies[8] = math.nan
    objective = replace(tbpo(), kl_coefficient=0.1, entropy_coefficient=0.1)
    same_but_for_the_dropped(batch, 2, objective, reference_logprobs=reference, entropies=entropies)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_empty_response_is_dropped_and_counted(name):
    same_but_for_the_dropped(make_batch((5, 3, 0, 2)), 2, OBJECTIVES[name])


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_no_tokens_give_loss_zero_with_a_gradient(name, lengths):
    loss, grad, sums = run(make_batch(lengths), OBJECTIVES[name], totals=(0, 0))
    assert loss == 0 and grad.shape == (0,)
    assert combine([sums]) == {key: float(len(lengths)) if key == "dropped" else 0.0 for key in SUMS}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_batch_of_which_nothing_is_valid_gives_zero(name):
    batch = make_batch()
    loss, grad, sums = run(replace(batch, sampler=torch.full_like(batch.sampler, -math.inf)), OBJECTIVES[name])
    assert loss == 0 and (grad == 0).all() and sums["dropped"] == 6
    assert all(map(math.isfinite, finalize(combine([sums])).values()))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_a_non_finite_current_logprob_surfaces_in_loss_and_gradient(name, bad, advantage):
    batch = replace(make_batch((4,)), advantages=torch.tensor([advantage], dtype=torch.float64))
    batch.logprobs[1] = bad
    loss, grad, _ = run(batch, OBJECTIVES[name])
    assert not torch.isfinite(loss) and not torch.isfinite(grad[1])


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_a_non_finite_reference_surfaces(estimator, bad):
    batch = make_batch()
    reference = batch.old.clone()
    reference[3] = bad
    objective = replace(tbpo(), kl_coefficient=0.1, kl_estimator=estimator)
    assert not torch.isfinite(run(batch, objective, reference_logprobs=reference)[0])


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("gap", [-1e4, 1e4])
def test_ratios_that_overflow_float32_leave_loss_and_gradient_finite(name, gap):
    batch = make_batch(dtype=torch.float32)
    for tensor in (batch.logprobs, batch.sampler):
        tensor[7:10] += gap
    loss, grad, sums = run(batch, OBJECTIVES[name])
    assert torch.isfinite(loss) and torch.isfinite(grad).all()
    assert all(map(math.isfinite, finalize(combine([sums])).values()))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_advantages_of_zero_give_no_gradient_and_count_on_neither_side(name):
    batch = make_batch()
    loss, grad, sums = run(replace(batch, advantages=torch.zeros_like(batch.advantages)), OBJECTIVES[name])
    assert loss == 0 and (grad == 0).all() and sums["positive"] == sums["negative"] == 0 and sums["units"] > 0


def test_a_penalty_without_its_input_is_refused():
    with pytest.raises(AssertionError, match="kl_coefficient"):
        run(make_batch(), replace(tbpo(), kl_coefficient=0.1))
    with pytest.raises(AssertionError, match="entropy_coefficient"):
        run(make_batch(), replace(tbpo(), entropy_coefficient=0.1))


def test_entropies_that_the_objective_does_not_use_are_only_counted():
    batch = make_batch()
    entropies = torch.full_like(batch.old, math.nan)
    loss, grad, _ = run(batch, tbpo(), entropies=entropies)
    assert torch.equal(loss, run(batch, tbpo())[0]) and torch.equal(grad, run(batch, tbpo())[1])
    assert run(batch, tbpo(), entropies=torch.full_like(batch.old, 0.5))[2]["entropy"] == 0.5 * 27


# Penalties


def test_kl_and_entropy_enter_with_their_sign_and_normaliser():
    batch = make_batch()
    reference, entropies = batch.old - 0.3, torch.linspace(0, 1, 27, dtype=torch.float64)
    objective = replace(grpo(), kl_coefficient=0.5, entropy_coefficient=0.25)
    loss, _, _ = run(batch, objective, reference_logprobs=reference, entropies=entropies)
    q = reference - batch.logprobs
    mask = pad(torch.ones_like(q), batch.lengths)
    penalty = 0.5 * pad(q.exp() - 1 - q, batch.lengths) - 0.25 * pad(entropies, batch.lengths)
    expected = run(batch, grpo())[0] + published_mean(penalty, mask, grpo())
    assert_exact(loss, expected)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimates_in_expectation(estimator):
    """Over all outcomes of a categorical policy: k1 and k3 have the KL as mean; k2 has its gradient, k1 has none."""
    logits = torch.tensor([0.3, -0.4, 1.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    logprobs = logits.log_softmax(-1)
    p = logprobs.exp()
    kl = (p * (logprobs - reference.log())).sum()
    (gradient,) = torch.autograd.grad(kl, logits, retain_graph=True)
    mean = (p.detach() * kl_estimate(logprobs, reference.log(), estimator)).sum()
    (mean_gradient,) = torch.autograd.grad(mean, logits)
    if estimator in ("k1", "k3"):
        assert_exact(mean, kl)
    if estimator in ("k1", "k2"):
        expected = torch.zeros_like(gradient) if estimator == "k1" else gradient
        torch.testing.assert_close(mean_gradient, expected, rtol=1e-11, atol=1e-15)


# Statistics


def statistics_batch() -> Batch:
    """Seven responses of two tokens, the same ratio on both, then an empty one. Different counts on each side."""
    ratios = torch.tensor([1.5, 0.5, 1.3, 1.4, 1.2, 0.5, 0.7], dtype=torch.float64).repeat_interleave(2)
    log_weights = torch.tensor([0.0, 0.0, 1.0, 1.0, -1.0, 0.0, 0.0], dtype=torch.float64).repeat_interleave(2)
    advantages = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    old = torch.full((14,), -2.0, dtype=torch.float64)
    return Batch(old + ratios.log(), old, old - log_weights, advantages, (2, 2, 2, 2, 2, 2, 2, 0))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_statistics_count_units_by_sign_and_side(level):
    objective = Objective(level, Bounds(0.1, 0.2, 0.15), "sequence_mean", Correction("mis", level, cap=2.0, floor=0.5))
    loss, _, sums = run(statistics_batch(), objective, entropies=torch.ones(14))
    units = 2 if level == "token" else 1  # of one response
    expected = {
        "loss": loss.item(),
        "tokens": 14,
        "sequences": 7,
        "dropped": 1,
        "units": 7 * units,
        "ratio": 7.1 * units,
        "ratio_max": 1.5,
        "positive": 4 * units,
        "negative": 3 * units,
        "positive_high": 3 * units,
        "negative_low": 2 * units,
        "negative_high": 1 * units,
        "correction_units": 7 * units,
        "correction_high": 2 * units,
        "correction_low": 1 * units,
        "kl": 0,
        "entropy": 14,
        "kl_step": 2 * sum(r - 1 - math.log(r) for r in (1.5, 0.5, 1.3, 1.4, 1.2, 0.5, 0.7)),
        "gradient": (1 - 0.5 * math.exp(-2)) / 7,  # the second response alone got through: 2 tokens, 0.5/14 on each
        **{key: 0 for key in SUMS if key.startswith("error_")},
    }
    assert combine([sums]) == pytest.approx(expected, rel=1e-12)
    metrics = finalize(combine([sums]))
    assert metrics["clip/positive_high"] == 3 / 4
    assert metrics["clip/negative_low"] == 2 / 3 and metrics["clip/negative_high"] == 1 / 3
    assert metrics["clip/mismatch_high"] == 2 / 7 and metrics["clip/mismatch_low"] == 1 / 7
    assert metrics["objective/ratio_mean"] == pytest.approx(7.1 / 7) and metrics["entropy"] == 1


def test_combine_adds_everything_but_the_largest_ratio():
    part = dict.fromkeys(SUMS, 2.0)
    assert combine([part, {**part, "ratio_max": 5.0}]) == {**dict.fromkeys(SUMS, 4.0), "ratio_max": 5.0}
    assert combine([]) == dict.fromkeys(SUMS, 0.0)


@pytest.mark.parametrize("ratios", [(1.0, math.nan), (math.nan, 1.0)])
def test_a_ratio_that_is_not_a_number_is_the_largest_wherever_it_stands(ratios):
    assert math.isnan(combine([dict.fromkeys(SUMS, 0.0) | {"ratio_max": ratio} for ratio in ratios])["ratio_max"])


def test_no_tokens_have_no_entropy():
    sums = dict.fromkeys(SUMS, 0.0)
    assert "entropy" not in finalize(sums)
    assert finalize(sums | {"tokens": 3.0})["entropy"] == 0


def test_shares_of_nothing_are_zero():
    assert set(finalize(combine([])).values()) == {0.0}


# Error responses beside the rest


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_sums_are_what_autograd_finds_at_the_logits(name):
    batch, errors = make_batch(seed=3), torch.tensor([True, False, False, True, False, True])
    batch = replace(batch, logprobs=batch.logprobs - 0.5, old=batch.old - 0.5, sampler=batch.sampler - 0.5)  # p < 1
    n, vocabulary = len(batch.logprobs), 7
    others = torch.randn(n, vocabulary - 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rest = torch.log1p(-batch.logprobs.exp())[:, None] + others.log_softmax(-1)
    logits = torch.cat([batch.logprobs[:, None], rest], -1).requires_grad_()  # the token drawn is the first
    logprobs = logits.log_softmax(-1)[:, 0]
    assert_exact(logprobs.detach(), batch.logprobs)
    batch = replace(batch, logprobs=logprobs)
    loss, sums = surrogate(
        batch.logprobs,
        old_logprobs=batch.old,
        sampler_logprobs=batch.sampler,
        advantages=batch.advantages,
        sequence=batch.sequence,
        n_sequences=6,
        batch_sequences=6,
        batch_tokens=n,
        objective=OBJECTIVES[name],
        errors=errors,
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    of_token = gradient.abs().sum(-1)
    assert sums["gradient"].item() == pytest.approx(of_token.sum().item(), rel=1e-9)
    assert sums["error_gradient"].item() == pytest.approx(of_token[errors[batch.sequence]].sum().item(), rel=1e-9)
    assert 0 < sums["error_gradient"] <= sums["gradient"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_counted_of_error_responses_is_what_a_batch_of_them_alone_counts(name):
    batch, errors = make_batch(seed=5), torch.tensor([False, True, True, False, False, True])
    _, grad, sums = run(batch, OBJECTIVES[name], errors=errors)
    _, unmarked_grad, unmarked = run(batch, OBJECTIVES[name])
    alone = run(batch.take([1, 2, 5]), OBJECTIVES[name])[2]
    for key in ("units", "ratio", "negative", "positive_high", "negative_low", "negative_high"):
        assert sums[f"error_{key}"].item() == pytest.approx(alone[key].item(), rel=1e-12)
        assert sums[key] == unmarked[key] and unmarked[f"error_{key}"] == 0
    assert torch.equal(grad, unmarked_grad)


def test_error_responses_stand_beside_the_rest_and_a_side_without_units_is_left_out():
    sums = dict.fromkeys(SUMS, 0.0) | {
        "units": 10.0,
        "ratio": 11.0,
        "negative": 6.0,
        "negative_high": 3.0,
        "gradient": 8.0,
    }
    errors = {"units": 4.0, "ratio": 6.0, "negative": 4.0, "negative_high": 3.0, "gradient": 6.0}
    found = finalize(sums | {f"error_{name}": value for name, value in errors.items()})
    assert found["error_tokens/ratio"] == 1.5 and found["error_tokens/rest_ratio"] == pytest.approx(5 / 6)
    assert found["error_tokens/negative"] == 1 and found["error_tokens/rest_negative"] == pytest.approx(1 / 3)
    assert found["error_tokens/clip_negative_high"] == 0.75 and found["error_tokens/rest_clip_negative_high"] == 0
    assert found["error_tokens/gradient"] == 0.75
    without = finalize(sums)
    assert "error_tokens/ratio" not in without and without["error_tokens/rest_ratio"] == 1.1
    assert without["error_tokens/gradient"] == 0
