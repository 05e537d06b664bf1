"""Per-token divergences, held against float64 and exact limits."""

import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from drpo_lightning.functional import binary_kl_divergence, binary_tv_divergence, k1_divergence, k3_divergence
from drpo_lightning.functional.divergences import log1mexp

LOGPROBS = st.one_of(
    st.floats(-60, -0.0009765625, width=32), st.floats(-20, -1, width=32).map(lambda x: -(2.0**x)), st.just(0.0)
)


def on_tokens(divergence, policy, rollout):
    return divergence(torch.tensor([policy]), torch.tensor([rollout])).item()


def rounded(value):
    """The float32 nearest to a Python float, so that reference and tensor speak of the same number."""
    return torch.tensor(value).item()


def reference_binary_kl(policy, rollout):
    mu, log_ratio = math.exp(rollout), policy - rollout
    if rollout == 0:
        return -log_ratio
    if policy == 0:
        return math.inf
    return -mu * log_ratio - math.expm1(rollout) * (math.log(-math.expm1(rollout)) - math.log(-math.expm1(policy)))


def test_divergences_worked_by_hand():
    policy, rollout = math.log(0.5), math.log(0.25)
    assert on_tokens(binary_tv_divergence, policy, rollout) == pytest.approx(0.25)
    assert on_tokens(binary_tv_divergence, rollout, policy) == pytest.approx(0.25)
    # 1/4 log(1/2) + 3/4 log(3/2)
    assert on_tokens(binary_kl_divergence, policy, rollout) == pytest.approx(0.1308120, abs=1e-6)
    # 1/2 log(2) + 1/2 log(2/3)
    assert on_tokens(binary_kl_divergence, rollout, policy) == pytest.approx(0.1438410, abs=1e-6)
    assert on_tokens(k1_divergence, policy, rollout) == pytest.approx(-math.log(2))
    assert on_tokens(k3_divergence, policy, rollout) == pytest.approx(2 - 1 - math.log(2))
    assert on_tokens(k3_divergence, rollout, policy) == pytest.approx(0.5 - 1 + math.log(2))


@pytest.mark.parametrize("divergence", [binary_tv_divergence, binary_kl_divergence, k1_divergence, k3_divergence])
def test_divergence_is_zero_on_policy(divergence):
    logprobs = torch.cat([-torch.logspace(-8, 2, 101), torch.zeros(1)])
    assert (divergence(logprobs, logprobs) == 0).all()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(policy=LOGPROBS, rollout=LOGPROBS)
def test_binary_kl_equals_a_float64_reference_away_from_a_certain_policy(policy, rollout):
    policy, rollout = rounded(policy), rounded(rollout)
    assume(abs(policy - rollout) <= 20 and (policy < -1e-3 or rollout >= 2 * policy))
    got = on_tokens(binary_kl_divergence, policy, rollout)
    expected = reference_binary_kl(policy, rollout)
    assert got == pytest.approx(expected, rel=1e-3, abs=2e-6)


@pytest.mark.parametrize(("policy", "rollout"), [(-1e-6, -5.0), (-1e-7, -0.5), (-1e-3, -15.0)])
def test_binary_kl_is_exact_where_the_policy_becomes_certain(policy, rollout):
    policy, rollout = rounded(policy), rounded(rollout)
    expected = reference_binary_kl(policy, rollout)
    assert on_tokens(binary_kl_divergence, policy, rollout) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-2, 1e-4, 1e-6])
def test_binary_kl_keeps_its_digits_near_certainty(scale):
    # log(1 - mu + eps) would be off by a factor here: 1 - mu is below float32's resolution of 1.
    policy, rollout = rounded(-3 * scale), rounded(-scale)
    expected = reference_binary_kl(policy, rollout)
    assert on_tokens(binary_kl_divergence, policy, rollout) == pytest.approx(expected, rel=1e-4)


def test_binary_kl_at_the_edges():
    assert on_tokens(binary_kl_divergence, 0.0, 0.0) == 0
    assert on_tokens(binary_kl_divergence, -1.5, 0.0) == 1.5
    certain = reference_binary_kl(-(2.0**-24), -1.5)
    assert on_tokens(binary_kl_divergence, 0.0, -1.5) == pytest.approx(certain, rel=1e-5)
    assert on_tokens(binary_kl_divergence, 0.0, -2e-3) < 0.05, "a token that stays near certain is inside the region"
    assert on_tokens(binary_kl_divergence, -60.0, -50.0) == pytest.approx(0, abs=1e-12)
    finite = binary_kl_divergence(torch.tensor([-math.inf, -1e30, -500.0]), torch.full((3,), -0.5))
    torch.testing.assert_close(finite, finite[-1:].expand(3))
    assert finite[0].item() == pytest.approx(reference_binary_kl(-20.5, -0.5), rel=1e-5)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(policy=LOGPROBS, rollout=LOGPROBS)
@example(policy=0.0, rollout=-60.0)
@example(policy=-60.0, rollout=0.0)
def test_divergences_are_in_range(policy, rollout):
    tv = on_tokens(binary_tv_divergence, policy, rollout)
    assert 0 <= tv <= 1 + 1e-6
    assert on_tokens(k3_divergence, policy, rollout) >= 0
    kl = on_tokens(binary_kl_divergence, policy, rollout)
    assert kl >= 0
    if abs(policy - rollout) < 20:
        assert kl >= 2 * tv**2 - 1e-5, "Pinsker's inequality of two Bernoulli distributions"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(policy=LOGPROBS, rollout=LOGPROBS)
def test_tv_k1_and_k3_equal_a_float64_reference(policy, rollout):
    policy, rollout = rounded(policy), rounded(rollout)
    log_ratio = policy - rollout
    assert on_tokens(k1_divergence, policy, rollout) == pytest.approx(-log_ratio, rel=1e-6)
    clamped = min(max(log_ratio, -20.0), 20.0)
    k3 = math.expm1(clamped) - clamped
    assert on_tokens(k3_divergence, policy, rollout) == pytest.approx(k3, rel=1e-5, abs=1e-6 * abs(clamped))
    tv = abs(math.exp(rollout) * math.expm1(clamped))
    assert on_tokens(binary_tv_divergence, policy, rollout) == pytest.approx(tv, rel=1e-5, abs=1e-7)


def test_k3_and_k1_are_unbiased_estimates_of_the_kl():
    mu = torch.tensor([0.5, 0.3, 0.15, 0.05])
    pi = torch.tensor([0.4, 0.2, 0.3, 0.1])
    exact = (mu * (mu / pi).log()).sum()
    for divergence in (k1_divergence, k3_divergence):
        torch.testing.assert_close((mu * divergence(pi.log(), mu.log())).sum(), exact)


def test_binary_divergences_bound_those_over_the_vocabulary_from_below():
    generator = torch.Generator().manual_seed(0)
    mu = torch.randn(200, 6, generator=generator).softmax(-1)
    pi = torch.randn(200, 6, generator=generator).softmax(-1)
    tv = (mu - pi).abs().sum(-1, keepdim=True) / 2
    kl = (mu * (mu / pi).log()).sum(-1, keepdim=True)
    assert (binary_tv_divergence(pi.log(), mu.log()) <= tv + 1e-6).all()
    assert (binary_kl_divergence(pi.log(), mu.log()) <= kl + 1e-6).all()


def test_log1mexp_is_exact_at_both_ends():
    for value in (-1e-30, -1e-8, -1e-3, -0.693, -0.694, -5.0, -30.0, -80.0):
        value = rounded(value)
        expected = math.log(-math.expm1(value)) if value > -1 else math.log1p(-math.exp(value))
        assert log1mexp(torch.tensor([value])).item() == pytest.approx(expected, rel=1e-5)
    assert log1mexp(torch.tensor([0.0])).item() == -math.inf
    assert log1mexp(torch.tensor([-math.inf])).item() == 0
