"""DRPO: worked examples, the formula in float64, limits, settings."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_lightning.objectives import DRPO, Unregularized

check = settings(max_examples=60, deadline=None, derandomize=True)


def reference(policy, rollout, advantage, delta):
    """`r A - |A| mu (r - 1)^2 / (2 delta)` and `w = 1 - sign(A (r - 1)) |pi - mu| / delta` of one token."""
    mu, ratio = math.exp(rollout), math.exp(min(max(policy - rollout, -20.0), 20.0))
    objective = ratio * advantage - abs(advantage) * mu * (ratio - 1) ** 2 / (2 * delta)
    direction = (advantage * (ratio - 1) > 0) - (advantage * (ratio - 1) < 0)
    weight = 1 - direction * abs(mu * ratio - mu) / delta
    return objective, weight, ratio


@pytest.mark.parametrize(
    ("pi", "mu", "advantage", "delta", "objective", "weight"),
    [
        # r = 2, shift = 0.25: 2 - 0.25 * 1 / 0.4
        (0.5, 0.25, 1.0, 0.2, 1.375, -0.25),
        # the same shift against the advantage: -2 - 0.625
        (0.5, 0.25, -1.0, 0.2, -2.625, 2.25),
        # r = 1/2, shift = -0.25, twice the advantage: 1 - 2 * 0.5 * 0.25 / 0.4
        (0.25, 0.5, 2.0, 0.2, 0.375, 2.25),
        (0.25, 0.5, -2.0, 0.2, -1.625, -0.25),
        # delta = 12.5: 2 - 0.25 / 25
        (0.5, 0.25, 1.0, 12.5, 1.99, 0.98),
        # at the boundary: r = 1.4, 1.4 - 0.5 * 0.16 / 0.4
        (0.7, 0.5, 1.0, 0.2, 1.2, 0.0),
        (0.25, 0.25, -3.0, 0.2, -3.0, 1.0),
    ],
)
def test_worked_by_hand(evaluate, pi, mu, advantage, delta, objective, weight):
    got = evaluate(DRPO(delta), math.log(pi), math.log(mu), advantage)
    assert got["loss"] == pytest.approx(-objective, rel=1e-5)
    assert got["grad_weight"] == pytest.approx(weight, abs=1e-5)
    assert got["grad_coefficient"] == pytest.approx(pi / mu * advantage * weight, abs=1e-5)
    assert got["grad"] == pytest.approx(pi / mu * advantage * weight, abs=1e-5)
    assert not got["beyond_clamp"]


@check
@given(seed=st.integers(0, 100_000), delta=st.floats(0.05, 20))
def test_equals_a_float64_loop_over_the_formula(make_tokens, seed, delta):
    tokens = make_tokens(seed)
    output = tokens.under(DRPO(delta))
    for i in tokens.completion_mask.nonzero().tolist():
        policy, rollout, advantage = (tensor[tuple(i)].item() for tensor in tokens[:3])
        objective, weight, ratio = reference(policy, rollout, advantage, delta)
        tolerance = 2e-5 * abs(ratio * advantage) * (1 + abs(weight)) + 1e-6 * abs(advantage)
        assert -output.loss[tuple(i)].item() == pytest.approx(objective, abs=tolerance)
        if abs(policy - rollout) <= 20:
            assert output.grad_coefficient[tuple(i)].item() == pytest.approx(ratio * advantage * weight, abs=tolerance)
            if advantage:
                assert output.grad_weight[tuple(i)].item() == pytest.approx(weight, rel=1e-5, abs=1e-5 / delta)


@pytest.mark.parametrize("delta", [0.15, 0.2, 1.0, 2.5, 12.5])
def test_weight_stays_between_one_minus_and_one_plus_the_inverse_of_delta(make_tokens, delta):
    low, high = 1 - 1 / delta, 1 + 1 / delta
    seen = torch.cat([make_tokens(seed).under(DRPO(delta)).grad_weight.flatten() for seed in range(20)])
    seen = seen[seen.isfinite() & (seen != 0)]
    assert low - 1e-5 <= seen.min() < low + 0.2 / delta
    assert high - 0.2 / delta < seen.max() <= high + 1e-5


@pytest.mark.parametrize("mu", [0.01, 0.2, 0.5, 0.79])
@pytest.mark.parametrize("delta", [0.15, 0.2])
def test_weight_fades_to_zero_at_the_boundary_and_corrects_beyond_it(evaluate, mu, delta):
    inside, edge, beyond = (
        evaluate(DRPO(delta), math.log(mu + share * delta), math.log(mu), 2.0)["grad_weight"]
        for share in (0.5, 1.0, 1.04)
    )
    assert inside == pytest.approx(0.5, abs=1e-4)
    assert edge == pytest.approx(0, abs=1e-4)
    assert beyond == pytest.approx(-0.04, abs=1e-4)
    assert evaluate(DRPO(delta), math.log(mu), math.log(mu + delta), -2.0)["grad_weight"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.01, -30.0])
def test_the_same_shift_of_probability_has_the_same_weight_whatever_mu_is(evaluate, advantage):
    weights = [
        evaluate(DRPO(0.2), math.log(mu + 0.1), math.log(mu), advantage)["grad_weight"] for mu in (0.001, 0.3, 0.8)
    ]
    expected = 1 - math.copysign(0.5, advantage)
    assert weights == pytest.approx([expected] * 3, abs=1e-4)


@pytest.mark.parametrize(("advantage", "mu"), [(1.0, 0.3), (-1.0, 0.3), (4.0, 0.95), (-0.1, 0.05)])
def test_the_maximiser_is_the_boundary_of_dppo(advantage, mu):
    grid = torch.linspace(0.0005, 1, 2000)
    tokens = (grid.log(), torch.full((2000,), math.log(mu)), torch.full((2000,), advantage))
    loss = DRPO(0.2)(*tokens, torch.ones(2000, dtype=torch.bool)).loss
    expected = min(max(mu + math.copysign(0.2, advantage), 0.0005), 1.0)
    assert grid[loss.argmin()].item() == pytest.approx(expected, abs=1e-3)


def test_penalty_is_spo_with_the_token_adaptive_range(evaluate):
    # SPO: r A - |A| (r - 1)^2 / (2 eps), with eps = delta / mu
    pi, mu, advantage, delta = 0.6, 0.4, -1.5, 0.3
    ratio, eps = pi / mu, delta / mu
    spo = ratio * advantage - abs(advantage) * (ratio - 1) ** 2 / (2 * eps)
    assert evaluate(DRPO(delta), math.log(pi), math.log(mu), advantage)["loss"] == pytest.approx(-spo, rel=1e-5)


def test_penalty_is_never_a_reward(make_tokens):
    tokens = make_tokens(11)
    assert (tokens.under(DRPO(0.2)).loss >= tokens.under(Unregularized()).loss).all()


@pytest.mark.parametrize("delta", [1e12, math.inf])
def test_delta_to_infinity_is_unregularized(make_tokens, delta):
    tokens = make_tokens(5)
    output, expected = tokens.under(DRPO(delta)), tokens.under(Unregularized())
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(output.grad_coefficient, expected.grad_coefficient, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(output.grad_weight, expected.grad_weight, rtol=1e-5, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("log_ratio", [-12.0, -16.0, -19.5])
def test_gradient_is_exact_for_a_ratio_near_zero(evaluate, log_ratio):
    got = evaluate(DRPO(0.2), -0.1 + log_ratio, -0.1, -1.0)
    assert got["grad"] == pytest.approx(got["grad_coefficient"], rel=1e-5)


@pytest.mark.parametrize(
    ("pi", "mu", "advantage", "objective", "weight"),
    [
        # r = 2, shift = 0.25: 2 - 0.25 * 1 / 0.4, whatever A is: w = 1 - 0.25 / (0.2 A)
        (0.5, 0.25, 1.0, 1.375, -0.25),
        (0.5, 0.25, 10.0, 19.375, 0.875),
        (0.5, 0.25, -0.1, -0.825, 13.5),
        (0.25, 0.25, -3.0, -3.0, 1.0),
    ],
)
def test_without_advantage_worked_by_hand(evaluate, pi, mu, advantage, objective, weight):
    got = evaluate(DRPO(0.2, scale_by_advantage=False), math.log(pi), math.log(mu), advantage)
    assert got["loss"] == pytest.approx(-objective, rel=1e-5)
    assert got["grad_weight"] == pytest.approx(weight, rel=1e-5)
    assert got["grad"] == pytest.approx(pi / mu * advantage * weight, rel=1e-5)


@check
@given(seed=st.integers(0, 100_000), delta=st.floats(0.05, 20))
def test_without_advantage_equals_a_float64_loop_over_the_formula(make_tokens, seed, delta):
    tokens = make_tokens(seed)
    output = tokens.under(DRPO(delta, scale_by_advantage=False))
    for i, policy, rollout, advantage in tokens.completion_tokens():
        mu, ratio = math.exp(rollout), math.exp(min(max(policy - rollout, -20.0), 20.0))
        objective = ratio * advantage - mu * (ratio - 1) ** 2 / (2 * delta)
        coefficient = ratio * advantage - ratio * mu * (ratio - 1) / delta
        tolerance = 2e-5 * ratio * (abs(advantage) + mu * abs(ratio - 1) / delta) + 1e-6 * (abs(advantage) + 1 / delta)
        assert -output.loss[i].item() == pytest.approx(objective, abs=tolerance)
        if abs(policy - rollout) <= 20:
            assert output.grad_coefficient[i].item() == pytest.approx(coefficient, abs=tolerance)


def test_without_advantage_a_token_is_pulled_back_at_no_advantage(evaluate):
    away, back = (evaluate(DRPO(0.2, scale_by_advantage=False), pi, mu, 0.0) for pi, mu in ((-0.7, -1.4), (-1.4, -0.7)))
    assert away["grad"] < 0 < back["grad"]
    assert evaluate(DRPO(0.2), -0.7, -1.4, 0.0)["grad"] == 0


@pytest.mark.parametrize("advantage", [0.25, -0.25])
def test_without_advantage_the_maximiser_moves_with_the_advantage(evaluate, advantage):
    # mu + delta A instead of mu + sign(A) delta
    pi = 0.4 + 0.2 * advantage
    for objective, weight in ((DRPO(0.2, scale_by_advantage=False), 0.0), (DRPO(0.2), 0.75)):
        assert evaluate(objective, math.log(pi), math.log(0.4), advantage)["grad_weight"] == pytest.approx(
            weight, abs=1e-5
        )


def test_it_has_no_mask(make_tokens):
    assert make_tokens(0).under(DRPO()).keep is None


def test_default_is_the_papers():
    assert DRPO() == DRPO(12.5)


@pytest.mark.parametrize("delta", [0.0, -1.0, math.nan])
def test_bad_delta_raises(delta):
    with pytest.raises(ValueError, match=rf"`delta` must be positive, in units of probability, got {delta}; "):
        DRPO(delta)


def test_describe_says_that_a_penalty_without_advantage_has_no_bound():
    assert "|pi - mu| = 0.2 |A|" in DRPO(0.2, scale_by_advantage=False).describe()
    assert "gradient weights have no bound" in DRPO(0.2, scale_by_advantage=False).describe()


def test_describe_names_the_regime_and_the_range_of_weights():
    trust_region = DRPO(0.2).describe()
    assert "trust-region regime" in trust_region
    assert "DRPO(delta=0.2)" in trust_region
    assert "[-4, 6]" in trust_region
    for delta, weights in ((12.5, "[0.92, 1.08]"), (1.0, "[0, 2]")):
        assert "reweighting regime" in DRPO(delta).describe()
        assert weights in DRPO(delta).describe()
