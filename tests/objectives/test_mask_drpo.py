"""Mask-DRPO: worked examples, the formula in float64, limits, settings."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_lightning.objectives import DPPO, DRPO, MaskDRPO, Unregularized

check = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("pi", "mu", "advantage", "delta", "objective", "weight"),
    [
        # r = 2, shift 0.25 > 0.15, diverging: DRPO
        (0.5, 0.25, 1.0, 0.2, 1.375, -0.25),
        (0.5, 0.25, 1.0, 12.5, 1.99, 0.98),
        (0.25, 0.5, -2.0, 0.2, -1.625, -0.25),
        # against the advantage: no penalty, and no amplification
        (0.5, 0.25, -1.0, 0.2, -2.0, 1.0),
        (0.25, 0.5, 2.0, 0.2, 1.0, 1.0),
        # shift 0.14: inside
        (0.39, 0.25, 2.0, 0.2, 3.12, 1.0),
    ],
)
def test_worked_by_hand(evaluate, pi, mu, advantage, delta, objective, weight):
    got = evaluate(MaskDRPO(delta, threshold=0.15), math.log(pi), math.log(mu), advantage)
    assert -got["loss"] == pytest.approx(objective, rel=1e-5)
    assert got["grad_weight"] == pytest.approx(weight, rel=1e-5)
    for name in ("grad_coefficient", "grad"):
        assert got[name] == pytest.approx(pi / mu * advantage * weight, rel=1e-5)
    assert "keep" not in got


@check
@given(seed=st.integers(0, 100_000), delta=st.floats(0.05, 20), threshold=st.sampled_from([0.01, 0.15, 0.6]))
def test_equals_a_float64_loop_over_the_formula(make_tokens, seed, delta, threshold):
    tokens = make_tokens(seed)
    output = tokens.under(MaskDRPO(delta, threshold))
    for i, policy, rollout, advantage in tokens.completion_tokens():
        mu, ratio = math.exp(rollout), math.exp(min(max(policy - rollout, -20.0), 20.0))
        shift = abs(mu * ratio - mu)
        if abs(shift - threshold) < 1e-5:
            continue
        inside = shift <= threshold or advantage * (ratio - 1) <= 0
        objective, weight = ratio * advantage, 1.0
        if not inside:
            objective -= abs(advantage) * mu * (ratio - 1) ** 2 / (2 * delta)
            weight = 1 - shift / delta
        tolerance = 2e-5 * abs(ratio * advantage) * (1 + abs(weight)) + 1e-6 * abs(advantage)
        assert -output.loss[i].item() == pytest.approx(objective, abs=tolerance)
        if abs(policy - rollout) <= 20:
            assert output.grad_coefficient[i].item() == pytest.approx(ratio * advantage * weight, abs=tolerance)
            if advantage:
                assert output.grad_weight[i].item() == pytest.approx(weight, rel=1e-5, abs=1e-5 / delta)


def test_inside_the_region_it_is_unregularized_and_outside_drpo(make_tokens):
    tokens = make_tokens(5)
    output, kept = tokens.under(MaskDRPO(0.2, 0.1)), tokens.under(DPPO("binary_tv", 0.1)).keep
    outside = tokens.completion_mask & ~kept
    assert kept.any()
    assert outside.any()
    for where, same in ((kept, Unregularized()), (outside, DRPO(0.2))):
        expected = tokens.under(same)
        assert torch.equal(output.loss[where], expected.loss[where])
        assert torch.equal(output.grad_coefficient[where], expected.grad_coefficient[where])


@pytest.mark.parametrize(("delta", "threshold"), [(0.2, 1.001), (0.2, math.inf), (math.inf, 0.15), (1e12, 0.15)])
def test_a_region_that_is_not_left_or_a_penalty_of_nothing_is_unregularized(make_tokens, delta, threshold):
    tokens = make_tokens(5)
    output, expected = tokens.under(MaskDRPO(delta, threshold)), tokens.under(Unregularized())
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(output.grad_coefficient, expected.grad_coefficient, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("delta", [0.15, 0.2, 12.5])
def test_weight_jumps_at_the_threshold_by_threshold_over_delta(evaluate, delta):
    inside, outside = (
        evaluate(MaskDRPO(delta, 0.15), math.log(0.25 + shift), math.log(0.25), 1.0)["grad_weight"]
        for shift in (0.15 - 1e-6, 0.15 + 1e-6)
    )
    assert inside == pytest.approx(1, rel=1e-6)
    assert outside == pytest.approx(1 - 0.15 / delta, abs=1e-4)


def test_with_delta_at_the_threshold_it_has_the_weight_of_dppo_at_the_boundary_and_corrects_beyond(evaluate):
    pi, mu = math.log(0.4 + 1e-6), math.log(0.25)
    got, masked = (evaluate(objective, pi, mu, 1.0) for objective in (MaskDRPO(0.15, 0.15), DPPO("binary_tv", 0.15)))
    assert got["grad_weight"] == pytest.approx(masked["grad_weight"], abs=1e-4)
    assert evaluate(MaskDRPO(0.15, 0.15), math.log(0.55), mu, 1.0)["grad_weight"] == pytest.approx(-1, rel=1e-4)


def test_defaults_are_the_papers():
    assert MaskDRPO() == MaskDRPO(delta=12.5, threshold=0.15)


@pytest.mark.parametrize("name", ["delta", "threshold"])
@pytest.mark.parametrize("value", [0.0, -0.1, math.nan])
def test_bad_settings_raise(name, value):
    with pytest.raises(ValueError, match=rf"`{name}` must be positive, in units of probability, got {value}"):
        MaskDRPO(**{name: value})


def test_describe_names_both_radii():
    assert "MaskDRPO(delta=0.2, threshold=0.1)" in MaskDRPO(0.2, 0.1).describe()
