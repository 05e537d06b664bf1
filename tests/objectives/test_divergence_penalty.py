"""Divergence penalties: worked examples, the formula in float64, the estimators, settings."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_lightning.functional import k1_divergence, k3_divergence
from drpo_lightning.objectives import DivergencePenalty, Unregularized

PENALTIES = ["kl", "k3", "tv"]
LOG2 = math.log(2)


@pytest.mark.parametrize(
    ("divergence", "pi", "mu", "objective", "weight"),
    [
        # r = 2 and 1/2, A = 2, b = 0.1: r A - b D, and 1 - b dD / (r A)
        ("kl", 0.5, 0.25, 4 + 0.1 * LOG2, 1 + 0.1 / 4),
        ("kl", 0.25, 0.5, 1 - 0.1 * LOG2, 1 + 0.1 / 1),
        ("k3", 0.5, 0.25, 4 - 0.1 * (1 - LOG2), 1 - 0.1 / 4),
        ("k3", 0.25, 0.5, 1 - 0.1 * (LOG2 - 0.5), 1 + 0.1 / 2),
        ("tv", 0.5, 0.25, 4 - 0.1 / 2, 1 - 0.1 / 4),
        ("tv", 0.25, 0.5, 1 - 0.1 / 4, 1 + 0.1 / 4),
    ],
)
def test_worked_by_hand(evaluate, divergence, pi, mu, objective, weight):
    got = evaluate(DivergencePenalty(divergence, 0.1), math.log(pi), math.log(mu), 2.0)
    assert -got["loss"] == pytest.approx(objective, rel=1e-5)
    assert got["grad_weight"] == pytest.approx(weight, rel=1e-5)
    for name in ("grad_coefficient", "grad"):
        assert got[name] == pytest.approx(pi / mu * 2 * weight, rel=1e-5)
    assert "keep" not in got


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 100_000),
    divergence=st.sampled_from(PENALTIES),
    beta=st.floats(0.01, 1),
    scale_by_advantage=st.booleans(),
)
def test_equals_a_float64_loop_over_the_formula(make_tokens, seed, divergence, beta, scale_by_advantage):
    tokens = make_tokens(seed)
    output = tokens.under(DivergencePenalty(divergence, beta, scale_by_advantage))
    for i, policy, rollout, advantage in tokens.completion_tokens():
        log_ratio = min(max(policy - rollout, -20.0), 20.0)
        ratio = math.exp(log_ratio)
        b = beta * abs(advantage) if scale_by_advantage else beta
        if divergence == "kl":
            penalty, slope = -log_ratio, -1.0
        elif divergence == "k3":
            penalty, slope = ratio - 1 - log_ratio, ratio - 1
        else:
            penalty, slope = abs(ratio - 1) / 2, ratio * ((ratio > 1) - (ratio < 1)) / 2
        tolerance = 2e-5 * (abs(ratio * advantage) + b * abs(penalty)) + 1e-6 * (abs(advantage) + b)
        assert -output.loss[i].item() == pytest.approx(ratio * advantage - b * penalty, abs=tolerance)
        if abs(policy - rollout) <= 20:
            tolerance = 2e-5 * (abs(ratio * advantage) + b * abs(slope)) + 1e-6 * (abs(advantage) + b)
            assert output.grad_coefficient[i].item() == pytest.approx(ratio * advantage - b * slope, abs=tolerance)


@pytest.mark.parametrize("scale_by_advantage", [False, True])
@pytest.mark.parametrize(("divergence", "estimate"), [("kl", k1_divergence), ("k3", k3_divergence)])
def test_the_penalty_is_the_estimate_of_functional(make_tokens, divergence, estimate, scale_by_advantage):
    tokens = make_tokens(5)
    near = (tokens.policy_logprobs - tokens.rollout_logprobs).abs() < 5
    tokens = tokens._replace(completion_mask=tokens.completion_mask & near)
    mask = tokens.completion_mask
    penalised = tokens.under(DivergencePenalty(divergence, 0.5, scale_by_advantage))
    penalty = (penalised.loss - tokens.under(Unregularized()).loss)[mask]
    scale = 0.5 * (tokens.advantages.abs() if scale_by_advantage else torch.ones_like(tokens.advantages))
    expected = scale[mask] * estimate(tokens.policy_logprobs, tokens.rollout_logprobs)[mask]
    size = penalised.loss[mask].abs() + 1
    assert ((penalty - expected).abs() <= 1e-5 * size).all()
    assert (expected != 0).any()


def test_on_samples_of_mu_the_penalty_is_the_divergence(evaluate):
    mu, pi = torch.tensor([0.5, 0.3, 0.15, 0.05]), torch.tensor([0.4, 0.2, 0.3, 0.1])
    kl, tv = (mu * (mu / pi).log()).sum().item(), (mu - pi).abs().sum().item() / 2
    for divergence, exact in (("kl", kl), ("k3", kl), ("tv", tv)):
        mean = sum(
            m * evaluate(DivergencePenalty(divergence, 1.0), math.log(p), math.log(m), 0.0)["loss"]
            for p, m in zip(pi.tolist(), mu.tolist(), strict=True)
        )
        assert mean == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("divergence", PENALTIES)
def test_at_no_advantage_only_a_scaled_penalty_is_silent(evaluate, divergence):
    for pi, mu in ((0.5, 0.25), (0.25, 0.5)):
        plain, scaled = (
            evaluate(DivergencePenalty(divergence, 0.1, scale), math.log(pi), math.log(mu), 0.0)
            for scale in (False, True)
        )
        assert scaled["grad"] == scaled["loss"] == 0
        # kl raises the probability of every sampled token, the others pull back
        assert (plain["grad"] > 0) == (divergence == "kl" or pi < mu)
        assert plain["grad"] != 0


@pytest.mark.parametrize(("divergence", "gradient"), [("kl", 2.1), ("k3", 2.0), ("tv", 2.0)])
def test_only_kl_has_a_gradient_at_equality(evaluate, divergence, gradient):
    got = evaluate(DivergencePenalty(divergence, 0.1), -1.0, -1.0, 2.0)
    assert got["grad"] == pytest.approx(gradient, rel=1e-6)
    assert got["grad_coefficient"] == pytest.approx(gradient, rel=1e-6)
    assert got["loss"] == -2


@pytest.mark.parametrize("divergence", PENALTIES)
def test_beta_to_zero_is_unregularized(make_tokens, divergence):
    tokens = make_tokens(5)
    output, expected = tokens.under(DivergencePenalty(divergence, 1e-30)), tokens.under(Unregularized())
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-6, atol=1e-20)
    torch.testing.assert_close(output.grad_coefficient, expected.grad_coefficient, rtol=1e-6, atol=1e-20)


@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan])
def test_bad_beta_raises(beta):
    with pytest.raises(ValueError, match=rf"`beta` must be positive, got {beta}; without a penalty take `Unreg"):
        DivergencePenalty(beta=beta)


@pytest.mark.usefixtures("unchecked_hints")
def test_unknown_divergence_raises():
    with pytest.raises(ValueError, match=r"`divergence` must be one of \['k3', 'kl', 'tv'\], got 'k2'"):
        DivergencePenalty("k2")


def test_describe_names_penalty_and_weight():
    assert "0.1 times the k3 estimate" in DivergencePenalty().describe()
    assert "0.3 |A| times the tv estimate" in DivergencePenalty("tv", 0.3, scale_by_advantage=True).describe()
