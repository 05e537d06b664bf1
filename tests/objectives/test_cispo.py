"""CISPO: worked examples, the formula in float64, limits, settings."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_lightning.objectives import CISPO, Unregularized


@pytest.mark.parametrize(
    ("pi", "mu", "advantage", "objective", "coefficient", "weight"),
    [
        (0.5, 0.25, 3.0, 6 * math.log(2), 6.0, 1.0),
        # r = 8 counts as 5, in either direction
        (0.8, 0.1, 1.0, 5 * math.log(8), 5.0, 5 / 8),
        (0.8, 0.1, -2.0, -10 * math.log(8), -10.0, 5 / 8),
        # nothing bounds it from below
        (0.01, 0.5, -1.0, -0.02 * math.log(0.02), -0.02, 1.0),
        (0.25, 0.25, -3.0, 0.0, -3.0, 1.0),
    ],
)
def test_worked_by_hand(evaluate, pi, mu, advantage, objective, coefficient, weight):
    got = evaluate(CISPO(5.0), math.log(pi), math.log(mu), advantage)
    assert -got["loss"] == pytest.approx(objective, rel=1e-5)
    assert got["grad_coefficient"] == pytest.approx(coefficient, rel=1e-5)
    assert got["grad"] == pytest.approx(coefficient, rel=1e-5)
    assert got["grad_weight"] == pytest.approx(weight, rel=1e-5)
    assert "keep" not in got


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 100_000), max_ratio=st.floats(1, 20))
def test_equals_a_float64_loop_over_the_formula(make_tokens, seed, max_ratio):
    tokens = make_tokens(seed)
    output = tokens.under(CISPO(max_ratio))
    for i, policy, rollout, advantage in tokens.completion_tokens():
        log_ratio = min(max(policy - rollout, -20.0), 20.0)
        coefficient = min(math.exp(log_ratio), max_ratio) * advantage
        assert -output.loss[i].item() == pytest.approx(coefficient * log_ratio, rel=2e-5, abs=1e-6 * abs(coefficient))
        if abs(policy - rollout) <= 20:
            assert output.grad_coefficient[i].item() == pytest.approx(coefficient, rel=1e-5)
            if advantage:
                weight = min(1.0, max_ratio / math.exp(log_ratio))
                assert output.grad_weight[i].item() == pytest.approx(weight, rel=1e-5)


def test_without_a_bound_it_has_the_gradient_of_unregularized(make_tokens):
    tokens = make_tokens(5)
    (output, grad), (expected, expected_grad) = (
        tokens.under_with_gradient(objective) for objective in (CISPO(math.inf), Unregularized())
    )
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=0.0)
    assert torch.equal(output.grad_coefficient, expected.grad_coefficient)


def test_a_bound_of_one_is_the_policy_gradient_for_tokens_that_became_likelier(make_tokens):
    tokens = make_tokens(5)
    output = tokens.under(CISPO(1.0))
    likelier = tokens.completion_mask & (tokens.policy_logprobs > tokens.rollout_logprobs) & ~output.beyond_clamp
    assert torch.equal(output.grad_coefficient[likelier], tokens.advantages[likelier])


@pytest.mark.parametrize("max_ratio", [0.99, 0.0, -1.0, math.nan])
def test_bad_max_ratio_raises(max_ratio):
    with pytest.raises(ValueError, match=rf"`max_ratio` must be at least 1, got {max_ratio}"):
        CISPO(max_ratio)


def test_describe_names_the_bound():
    assert "cut at 3.5" in CISPO(3.5).describe()
