"""SPO: worked examples, the formula in float64, limits, settings."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_lightning.objectives import SPO, Unregularized, drpo, spo

check = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("pi", "mu", "advantage", "epsilon", "objective", "weight"),
    [
        # r = 2: 2 - 1 / 0.4
        (0.5, 0.25, 1.0, 0.2, -0.5, -4.0),
        # the same ratio against the advantage: -2 - 2.5
        (0.5, 0.25, -1.0, 0.2, -4.5, 6.0),
        # r = 1/2, twice the advantage: 1 - 2 * 0.25 / 25
        (0.25, 0.5, 2.0, 12.5, 0.98, 1.04),
        # at the edge of the range, r = 1.5: 1.5 - 0.25 / 1
        (0.75, 0.5, 1.0, 0.5, 1.25, 0.0),
        (0.25, 0.25, -3.0, 0.2, -3.0, 1.0),
    ],
)
def test_worked_by_hand(evaluate, pi, mu, advantage, epsilon, objective, weight):
    got = evaluate(SPO(epsilon), math.log(pi), math.log(mu), advantage)
    assert -got["loss"] == pytest.approx(objective, rel=1e-5)
    assert got["grad_weight"] == pytest.approx(weight, rel=1e-5, abs=1e-5)
    for name in ("grad_coefficient", "grad"):
        assert got[name] == pytest.approx(pi / mu * advantage * weight, rel=1e-5, abs=1e-5)
    assert "keep" not in got


@check
@given(seed=st.integers(0, 100_000), epsilon=st.floats(0.05, 20))
def test_equals_a_float64_loop_over_the_formula(make_tokens, seed, epsilon):
    tokens = make_tokens(seed)
    output = tokens.under(SPO(epsilon))
    for i, policy, rollout, advantage in tokens.completion_tokens():
        ratio = math.exp(min(max(policy - rollout, -20.0), 20.0))
        objective = ratio * advantage - abs(advantage) * (ratio - 1) ** 2 / (2 * epsilon)
        direction = math.copysign(1, advantage * (ratio - 1))
        weight = 1 - direction * abs(ratio - 1) / epsilon
        tolerance = 2e-5 * abs(ratio * advantage) * (1 + abs(weight)) + 1e-6 * abs(advantage) * (1 + 1 / epsilon)
        assert -output.loss[i].item() == pytest.approx(objective, abs=tolerance)
        if abs(policy - rollout) <= 20:
            assert output.grad_coefficient[i].item() == pytest.approx(ratio * advantage * weight, abs=tolerance)
            if advantage:
                assert output.grad_weight[i].item() == pytest.approx(weight, rel=2e-5, abs=2e-5 / epsilon)


@check
@given(seed=st.integers(0, 100_000), delta=st.floats(0.05, 20))
def test_with_a_range_of_delta_over_mu_it_is_drpo(make_tokens, seed, delta):
    tokens = make_tokens(seed)[:3]
    got = spo(*tokens, epsilon=delta / tokens[1].exp())
    expected = drpo(*tokens, delta=delta)
    scale = (tokens[0] - tokens[1]).clamp(-20, 20).exp() * tokens[2].abs() / delta
    for a, b in zip(got[:2], expected[:2], strict=True):
        assert ((a - b).abs() <= 1e-5 * (b.abs() + scale) + 1e-6 * tokens[2].abs()).all()


@pytest.mark.parametrize("epsilon", [1e12, math.inf])
def test_epsilon_to_infinity_is_unregularized(make_tokens, epsilon):
    tokens = make_tokens(5)
    near = tokens.policy_logprobs < tokens.rollout_logprobs + 5
    tokens = tokens._replace(completion_mask=tokens.completion_mask & near)
    output, expected = tokens.under(SPO(epsilon)), tokens.under(Unregularized())
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(output.grad_weight, expected.grad_weight, rtol=1e-5, atol=0.0, equal_nan=True)


def test_weight_has_no_bound_for_a_rare_token(evaluate):
    weights = [evaluate(SPO(12.5), math.log(0.1), math.log(mu), 1.0)["grad_weight"] for mu in (1e-2, 1e-4, 1e-6)]
    assert weights == pytest.approx([1 - (0.1 / mu - 1) / 12.5 for mu in (1e-2, 1e-4, 1e-6)], rel=1e-4)


def test_default_is_what_drpos_paper_compares_with():
    assert SPO() == SPO(12.5)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan])
def test_bad_epsilon_raises(epsilon):
    with pytest.raises(ValueError, match=rf"`epsilon` must be positive, got {epsilon}"):
        SPO(epsilon)


def test_describe_names_the_range():
    assert "SPO(epsilon=0.3)" in SPO(0.3).describe()
    assert "gradient weights have no bound" in SPO().describe()
