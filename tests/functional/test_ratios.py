"""Importance ratio and probability shift."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_lightning.functional import (
    LOG_RATIO_CLAMP,
    importance_ratio,
    log_importance_ratio,
    probability_shift,
    within_log_ratio_clamp,
)

LOGPROBS = st.floats(-60, 0, width=32)


def test_clamp_is_twenty_nats():
    assert LOG_RATIO_CLAMP == 20.0


def test_ratio_and_shift_worked_by_hand():
    policy, rollout = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.25, 0.3, 0.4]).log()
    torch.testing.assert_close(importance_ratio(policy, rollout), torch.tensor([2.0, 1.0, 0.5]))
    torch.testing.assert_close(probability_shift(policy, rollout), torch.tensor([0.25, 0.0, -0.2]))


def test_ratio_is_one_and_shift_zero_exactly_where_policies_are_equal():
    logprobs = torch.linspace(-60, 0, 101)
    assert (importance_ratio(logprobs, logprobs) == 1).all()
    assert (probability_shift(logprobs, logprobs) == 0).all()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(policy=LOGPROBS, rollout=LOGPROBS)
def test_ratio_and_shift_equal_a_float64_reference(policy, rollout):
    log_ratio = min(max(policy - rollout, -20.0), 20.0)
    got_ratio = importance_ratio(torch.tensor([policy]), torch.tensor([rollout])).item()
    got_shift = probability_shift(torch.tensor([policy]), torch.tensor([rollout])).item()
    assert got_ratio == pytest.approx(math.exp(log_ratio), rel=1e-5)
    assert got_shift == pytest.approx(math.exp(rollout) * (math.exp(log_ratio) - 1), rel=1e-5, abs=1e-6)
    assert abs(got_shift) <= 1 + 1e-6


def test_small_shift_keeps_its_digits():
    policy, rollout = torch.tensor([-1.0 - 2**-22]), torch.tensor([-1.0])
    expected = math.exp(-1) * math.expm1(-(2**-22))
    assert probability_shift(policy, rollout).item() == pytest.approx(expected, rel=1e-5)


def test_beyond_the_clamp_ratio_is_finite_and_has_no_gradient():
    log_ratio = torch.tensor([-100.0, -20.0, -15.0, 0.0, 15.0, 20.0, 100.0], requires_grad=True)
    rollout = torch.full((7,), -0.5)
    ratio = importance_ratio(log_ratio + rollout, rollout)
    ratio.sum().backward()
    clamped = torch.tensor([-20.0, -20.0, -15.0, 0.0, 15.0, 20.0, 20.0]).exp()
    torch.testing.assert_close(ratio.detach(), clamped, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(log_ratio.grad, clamped * torch.tensor([0.0, 1, 1, 1, 1, 1, 0]), rtol=1e-5, atol=0.0)


def test_log_ratio_is_clamped_and_has_a_gradient_of_one_inside():
    log_ratio = torch.tensor([-100.0, -20.0, -15.0, 0.0, 15.0, 20.0, 100.0], requires_grad=True)
    got = log_importance_ratio(log_ratio - 0.5, torch.full((7,), -0.5))
    got.sum().backward()
    assert got.tolist() == [-20, -20, -15, 0, 15, 20, 20]
    assert log_ratio.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]


def test_gradient_of_the_shift_is_pi():
    policy = torch.tensor([0.5, 0.01, 0.9]).log().requires_grad_()
    probability_shift(policy, torch.tensor([0.25, 0.3, 0.9]).log()).sum().backward()
    torch.testing.assert_close(policy.grad, policy.detach().exp())


def test_clamp_bound_is_inclusive():
    rollout = torch.full((5,), -20.0)
    above = torch.nextafter(torch.tensor(-40.0), torch.tensor(-50.0)).item()
    policy = torch.tensor([0.0, -40.0, -20.0, 1e-5, above])
    assert within_log_ratio_clamp(policy, rollout).tolist() == [True, True, True, False, False]
    assert within_log_ratio_clamp(torch.tensor([-15.0]), torch.tensor([0.0])).item()
