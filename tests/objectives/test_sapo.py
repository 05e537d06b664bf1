"""SAPO: worked examples, the formula in float64, limits, settings."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_lightning.objectives import SAPO, Unregularized


@pytest.mark.parametrize(
    ("pi", "mu", "advantage", "objective", "weight"),
    [
        # sigmoid(1) = 0.73106, sigmoid(-0.5) = 0.37754; tau = 2 for A < 0: sigmoid(2) = 0.88080, sigmoid(-1) = 0.26894
        (0.5, 0.25, 1.0, 4 * 0.7310586, 0.7864477),
        (0.25, 0.5, 3.0, 12 * 0.3775407, 0.9400148),
        (0.5, 0.25, -1.0, -2 * 0.8807971, 0.4199743),
        (0.25, 0.5, -1.0, -2 * 0.2689414, 0.7864477),
        (0.25, 0.25, 3.0, 6.0, 1.0),
        (0.25, 0.25, -3.0, -3.0, 1.0),
    ],
)
def test_worked_by_hand(evaluate, pi, mu, advantage, objective, weight):
    got = evaluate(SAPO(1.0, 2.0), math.log(pi), math.log(mu), advantage)
    assert -got["loss"] == pytest.approx(objective, rel=1e-5)
    assert got["grad_weight"] == pytest.approx(weight, rel=1e-5)
    for name in ("grad_coefficient", "grad"):
        assert got[name] == pytest.approx(pi / mu * advantage * weight, rel=1e-5)
    assert "keep" not in got


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 100_000), positive=st.floats(0.1, 5), negative=st.floats(0.1, 5))
def test_equals_a_float64_loop_over_the_formula(make_tokens, seed, positive, negative):
    tokens = make_tokens(seed)
    output = tokens.under(SAPO(positive, negative))
    for i, policy, rollout, advantage in tokens.completion_tokens():
        tau = positive if advantage > 0 else negative
        ratio = math.exp(min(max(policy - rollout, -20.0), 20.0))
        gate = 1 / (1 + math.exp(-min(tau * (ratio - 1), 500)))
        assert -output.loss[i].item() == pytest.approx(4 / tau * gate * advantage, rel=2e-5)
        weight = 4 / (2 + math.exp(min(tau * (ratio - 1), 500)) + math.exp(-min(tau * (ratio - 1), 500)))
        if abs(policy - rollout) <= 20:
            expected = pytest.approx(weight * ratio * advantage, rel=1e-4, abs=1e-6 * abs(ratio * advantage))
            assert output.grad_coefficient[i].item() == expected
            if advantage:
                assert output.grad_weight[i].item() == pytest.approx(weight, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 5.0])
def test_weight_is_one_at_equality_and_falls_on_both_sides(evaluate, temperature):
    weights = [
        evaluate(SAPO(temperature, temperature), math.log(0.25 * ratio), math.log(0.25), 1.0)["grad_weight"]
        for ratio in (0.25, 0.5, 1.0, 2.0, 3.9)
    ]
    assert weights[2] == pytest.approx(1, rel=1e-6)
    assert weights[0] < weights[1] < weights[2] > weights[3] > weights[4]


def test_tau_to_zero_has_the_gradient_of_unregularized(make_tokens):
    tokens = make_tokens(5)
    near = tokens.policy_logprobs < tokens.rollout_logprobs + 3
    tokens = tokens._replace(completion_mask=tokens.completion_mask & near)
    output, expected = tokens.under(SAPO(1e-4, 1e-4)), tokens.under(Unregularized())
    torch.testing.assert_close(output.grad_coefficient, expected.grad_coefficient, rtol=1e-4, atol=0.0)


def test_a_larger_tau_closes_the_gate_sooner(evaluate):
    cold, hot = (evaluate(SAPO(tau, 1.0), math.log(0.5), math.log(0.25), 1.0)["grad_weight"] for tau in (1.0, 2.0))
    assert hot < cold


def test_defaults_are_the_papers():
    assert SAPO() == SAPO(temperature_positive=1.0, temperature_negative=1.05)


@pytest.mark.parametrize("name", ["temperature_positive", "temperature_negative"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_bad_temperature_raises(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be positive, got {value}"):
        SAPO(**{name: value})


def test_describe_names_both_temperatures():
    assert "tau 1 for A > 0, else 1.05" in SAPO().describe()
