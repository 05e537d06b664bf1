"""The penalty towards a reference model, held against float64 loops, autograd and exact expectations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_lightning.functional import has_reference_gradient, reference_kl, reference_penalty

SEEDS = st.integers(0, 100_000)
CASES = [(estimator, weighted) for estimator in ("k1", "k3") for weighted in (True, False)]
NAMES = [f"{'r ' if weighted else ''}{estimator}" for estimator, weighted in CASES]
CASE = pytest.mark.parametrize(("estimator", "weighted"), CASES, ids=NAMES)


def random_tokens(seed, shape=(5, 8)):
    """log pi, log mu, log ref and a mask: equal, near, far and beyond the clamps on either side."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return low + (high - low) * torch.rand(shape, generator=generator)

    def away(logprobs):
        kind = uniform(0, 1)
        moved = logprobs + torch.where(kind < 0.5, uniform(-1, 1), uniform(-15, 15))
        moved = torch.where(kind < 0.1, logprobs, moved)
        moved = torch.where(kind > 0.9, logprobs - uniform(21, 60), moved)
        return torch.where(kind > 0.95, logprobs + uniform(21, 60), moved)

    policy = uniform(-12, 0)
    return policy, away(policy), away(policy), uniform(0, 1) < 0.7


def penalties_and_gradient(tokens, estimator, weighted):
    policy, *others = tokens
    policy = policy.clone().requires_grad_()
    penalty = reference_penalty(policy, *others, estimator=estimator, importance_weighted=weighted)
    penalty.sum().backward()
    return penalty.detach(), policy.grad


def by_the_formula(policy, rollout, reference, estimator, weighted):
    """Penalty and derivative of one token in float64, as the docstring states them."""
    log_ratio = max(policy - reference, -20.0)
    ratio = math.exp(min(max(policy - rollout, -20.0), 20.0)) if weighted else 1.0
    k = log_ratio if estimator == "k1" else math.exp(-log_ratio) - 1 + log_ratio
    coefficient = {
        ("k1", True): ratio * (1 + log_ratio),
        ("k3", True): ratio * log_ratio,
        ("k1", False): 1.0,
        ("k3", False): 1 - math.exp(-log_ratio),
    }[estimator, weighted]
    has_gradient = policy - reference >= -20 and (not weighted or abs(policy - rollout) <= 20)
    return ratio * k, coefficient if has_gradient else 0.0


@CASE
@settings(max_examples=50, deadline=None, derandomize=True)
@given(seed=SEEDS)
def test_equals_a_float64_loop_over_the_formula(estimator, weighted, seed):
    tokens = random_tokens(seed)
    penalty, gradient = penalties_and_gradient(tokens, estimator, weighted)
    for i in torch.cartesian_prod(*map(torch.arange, penalty.shape)).tolist():
        policy, rollout, reference, is_completion = (values[tuple(i)].item() for values in tokens)
        expected = by_the_formula(policy, rollout, reference, estimator, weighted) if is_completion else (0.0, 0.0)
        # What float32 loses: in log pi - log ref, in the difference of two terms of the size of ref / pi; times r.
        ratio = math.exp(min(max(policy - rollout, -20), 20)) if weighted else 1.0
        error = ratio * (1e-5 + 3e-7 * math.exp(min(reference - policy, 20)))
        assert penalty[tuple(i)].item() == pytest.approx(expected[0], rel=1e-4, abs=error)
        assert gradient[tuple(i)].item() == pytest.approx(expected[1], rel=1e-4, abs=error)


def test_worked_by_hand():
    """pi = 1/2, mu = 1/4, ref = 1/8: r = 2, k1 = log 4, k3 = 1/4 - 1 + log 4."""
    tokens = (*(torch.tensor([math.log(p)]) for p in (0.5, 0.25, 0.125)), torch.tensor([True]))
    expected = {
        ("k1", True): (2 * math.log(4), 2 + 2 * math.log(4)),
        ("k3", True): (2 * (math.log(4) - 0.75), 2 * math.log(4)),
        ("k1", False): (math.log(4), 1),
        ("k3", False): (math.log(4) - 0.75, 0.75),
    }
    for case, (value, slope) in expected.items():
        penalty, gradient = penalties_and_gradient(tokens, *case)
        assert (penalty.item(), gradient.item()) == pytest.approx((value, slope), rel=1e-5)


# ---------------------------------------------------------------- exact means over a small vocabulary


def distributions(seed, size=7):
    """Logits, and log mu and log ref of other distributions, in float32 as the function computes."""
    generator = torch.Generator().manual_seed(seed)
    logits, mu, ref = (torch.randn(size, generator=generator) for _ in range(3))
    return logits.requires_grad_(), mu.log_softmax(0), ref.log_softmax(0)


def mean_gradient(logits, sampled_from, reference, estimator, weighted):
    """Gradient in the logits of the penalty's mean over all tokens, as they were sampled."""
    policy = logits.log_softmax(0)
    everywhere = torch.ones(len(logits), dtype=torch.bool)
    penalty = reference_penalty(
        policy, sampled_from, reference, everywhere, estimator=estimator, importance_weighted=weighted
    )
    return torch.autograd.grad((sampled_from.exp() * penalty).sum(), logits)[0]


def kl_gradient(logits, reference, *, forward=False):
    pi = logits.double().log_softmax(0)
    ref = reference.double()
    kl = (ref.exp() * (ref - pi)).sum() if forward else (pi.exp() * (pi - ref)).sum()
    return torch.autograd.grad(kl, logits)[0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_on_samples_of_pi_both_estimates_have_the_mean_kl(seed, estimator):
    logits, _, ref = distributions(seed)
    pi = logits.detach().double().log_softmax(0)
    mean = (pi.exp() * reference_kl(pi, ref.double(), estimator=estimator)).sum()
    torch.testing.assert_close(mean, (pi.exp() * (pi - ref.double())).sum())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_importance_weighted_the_gradient_is_that_of_the_divergence(seed, estimator):
    logits, mu, ref = distributions(seed)
    expected = kl_gradient(logits, ref)
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(mean_gradient(logits, mu, ref, estimator, True), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_plain_k3_has_the_gradient_of_the_forward_divergence(seed):
    logits, _, ref = distributions(seed)
    found = mean_gradient(logits, logits.detach().log_softmax(0), ref, "k3", False)
    torch.testing.assert_close(found, kl_gradient(logits, ref, forward=True), rtol=0, atol=1e-6)
    assert (found - kl_gradient(logits, ref)).abs().max() > 1e-2


@pytest.mark.parametrize("seed", range(5))
def test_plain_k1_has_a_gradient_of_mean_zero(seed):
    logits, _, ref = distributions(seed)
    found = mean_gradient(logits, logits.detach().log_softmax(0), ref, "k1", False)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-6)


# ---------------------------------------------------------------- edges


@CASE
def test_garbage_outside_the_completions_changes_nothing(estimator, weighted):
    tokens = random_tokens(3)
    mask = tokens[3]
    clean = penalties_and_gradient(tokens, estimator, weighted)
    for garbage in (math.nan, math.inf, -math.inf, 1e30):
        dirty = (*(values.where(mask, torch.tensor(garbage)) for values in tokens[:3]), mask)
        for found, expected in zip(penalties_and_gradient(dirty, estimator, weighted), clean, strict=True):
            assert torch.equal(found, expected)
    assert not clean[0][~mask].any()
    assert not clean[1][~mask].any()


@CASE
def test_only_the_policy_gets_a_gradient(estimator, weighted):
    *logprobs, mask = random_tokens(5)
    leaves = [values.clone().requires_grad_() for values in logprobs]
    reference_penalty(*leaves, mask, estimator=estimator, importance_weighted=weighted).sum().backward()
    policy, rollout, reference = leaves
    assert policy.grad.abs().sum() > 0
    assert (rollout.grad, reference.grad) == (None, None)


@CASE
def test_at_the_reference_there_is_no_penalty_and_only_k1_has_a_slope(estimator, weighted):
    policy, _, _, mask = random_tokens(7)
    penalty, gradient = penalties_and_gradient((policy, policy, policy, mask), estimator, weighted)
    assert not penalty.any()
    assert torch.equal(gradient, mask.float() if estimator == "k1" else torch.zeros_like(gradient))


@CASE
def test_beyond_a_clamp_the_penalty_is_finite_and_has_no_gradient(estimator, weighted):
    policy = torch.tensor([-90.0, -20.0, -20.5, -0.5, -25.0])
    rollout = torch.tensor([-90.0, -20.0, -20.5, -25.0, -0.5])
    reference = torch.tensor([-0.1, 0.0, -0.25, -0.5, -25.0])
    penalty, gradient = penalties_and_gradient((policy, rollout, reference, torch.ones(5).bool()), estimator, weighted)
    assert penalty.isfinite().all()
    # log ref - log pi is 89.9, 20 and 20.25, then |log pi - log mu| is 24.5 twice.
    assert (gradient[0], gradient[2]) == (0, 0)
    assert gradient[1] != 0
    assert (has_reference_gradient(policy, reference) == torch.tensor([False, True, False, True, True])).all()
    assert gradient[3:].any().item() == (estimator == "k1" and not weighted)


def test_a_token_that_the_reference_all_but_rules_out_is_pulled_back_in_full():
    certain, ruled_out = torch.tensor([-1e-3]), torch.tensor([-80.0])
    for estimator in ("k1", "k3"):
        tokens = (certain, certain, ruled_out, torch.tensor([True]))
        penalty, gradient = penalties_and_gradient(tokens, estimator, True)
        assert (penalty.item(), gradient.item()) == pytest.approx((80, 80), abs=1.1)


def test_k3_is_never_negative():
    policy, _, reference, _ = random_tokens(11, (100, 100))
    assert (reference_kl(policy, reference, estimator="k3") >= 0).all()
    assert (reference_kl(policy, reference, estimator="k1") < 0).any()


def test_layouts_are_equal():
    *tokens, mask = random_tokens(13)
    padded = reference_penalty(*tokens, mask)
    packed = reference_penalty(*(values[mask] for values in tokens), mask[mask])
    assert torch.equal(padded[mask], packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logprobs_of_lower_precision_are_computed_with_in_float32(dtype):
    tokens = random_tokens(17)
    low = [values.to(dtype) for values in tokens[:3]]
    expected = reference_penalty(*(values.float() for values in low), tokens[3])
    assert torch.equal(reference_penalty(*low, tokens[3]), expected)


def test_an_unknown_estimator_raises(monkeypatch):
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"`estimator` must be one of \['k1', 'k3'\], got 'k2'"):
        reference_kl(torch.zeros(1), torch.zeros(1), estimator="k2")
