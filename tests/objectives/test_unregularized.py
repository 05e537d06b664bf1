"""The importance-weighted policy gradient: worked examples and the formula in float64."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_lightning.objectives import Unregularized


@pytest.mark.parametrize(
    ("pi", "mu", "advantage", "expected"), [(0.5, 0.25, 3.0, 6.0), (0.25, 0.5, -3.0, -1.5), (0.9, 0.001, -1.0, -900.0)]
)
def test_worked_by_hand(evaluate, pi, mu, advantage, expected):
    got = evaluate(Unregularized(), math.log(pi), math.log(mu), advantage)
    assert -got["loss"] == pytest.approx(expected, rel=1e-5)
    assert got["grad_coefficient"] == pytest.approx(expected, rel=1e-5)
    assert got["grad"] == pytest.approx(expected, rel=1e-5)
    assert got["grad_weight"] == pytest.approx(1, rel=1e-6)
    assert "keep" not in got


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 100_000))
def test_equals_a_float64_loop_over_the_formula(make_tokens, seed):
    tokens = make_tokens(seed)
    output = tokens.under(Unregularized())
    for i in tokens.completion_mask.nonzero().tolist():
        policy, rollout, advantage = (tensor[tuple(i)].item() for tensor in tokens[:3])
        expected = math.exp(min(max(policy - rollout, -20.0), 20.0)) * advantage
        assert -output.loss[tuple(i)].item() == pytest.approx(expected, rel=1e-5)


def test_describe_says_that_nothing_limits_the_update():
    assert "nothing limits the update" in Unregularized().describe()
