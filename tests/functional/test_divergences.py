"""Per-token divergences, held against float64 and exact limits."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from drpo_lightning.functional import (
    TopKLogprobs,
    binary_kl_divergence,
    binary_tv_divergence,
    k1_divergence,
    k3_divergence,
    topk_kl_divergence,
    topk_tv_divergence,
)
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


# ---------------------------------------------------------------- top K

VOCABULARY = 9
BINARY = {"tv": binary_tv_divergence, "kl": binary_kl_divergence}
TOPK = {"tv": topk_tv_divergence, "kl": topk_kl_divergence}


def distributions(seed, sharpness, num_tokens=20):
    """log pi and log mu over a vocabulary, float32, and a token sampled from mu at each place."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(2, num_tokens, VOCABULARY, generator=generator)
    pi, mu = logits.log_softmax(-1)
    return pi, mu, torch.multinomial(mu.exp(), 1, generator=generator)[:, 0]


def inputs(pi, mu, sampled, k):
    """What a top-K divergence takes: logprobs of the sampled token, and of mu's K most likely ones."""
    own = sampled[:, None]
    ids = mu.topk(k).indices
    topk = TopKLogprobs(pi.gather(1, ids), mu.gather(1, ids), (ids == own).any(1))
    return pi.gather(1, own)[:, 0], mu.gather(1, own)[:, 0], topk


def exact_divergence(divergence, pi, mu):
    """TV or KL over the whole vocabulary, in float64."""
    pi, mu = pi.double().log_softmax(-1), mu.double().log_softmax(-1)
    if divergence == "tv":
        return (pi.exp() - mu.exp()).abs().sum(-1) / 2
    return (mu.exp() * (mu - pi)).sum(-1)


def test_topk_divergences_worked_by_hand():
    pi, mu = torch.tensor([[0.1, 0.6, 0.2, 0.1]]).log(), torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    for k, sampled, tv, kl in (
        # buckets {0}, {1, 2, 3}
        (1, 0, 0.3, 0.4 * math.log(4) + 0.6 * math.log(6 / 9)),
        # {0}, {3}, {1, 2}
        (1, 3, 0.3, 0.4 * math.log(4) + 0.5 * math.log(5 / 8)),
        # {0}, {1}, {2, 3}
        (2, 1, 0.3, 0.4 * math.log(4) + 0.3 * math.log(1 / 2)),
    ):
        arguments = inputs(pi, mu, torch.tensor([sampled]), k)
        assert topk_tv_divergence(*arguments).item() == pytest.approx(tv, rel=1e-5)
        assert topk_kl_divergence(*arguments).item() == pytest.approx(kl, rel=1e-5)
    pi = torch.tensor([[0.3, 0.4, 0.2, 0.1]]).log()
    # {1} and {0, 2, 3}: 0.1; with {0} apart as well: 0.1; the rest, {2, 3}, has not changed
    assert topk_tv_divergence(*inputs(pi, mu, torch.tensor([1]), 1)).item() == pytest.approx(0.1, rel=1e-5)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 100_000),
    sharpness=st.sampled_from([0.1, 1.0, 3.0]),
    divergence=st.sampled_from(["tv", "kl"]),
    k=st.integers(1, VOCABULARY),
)
def test_topk_equals_a_float64_loop_over_the_buckets(seed, sharpness, divergence, k):
    pi, mu, sampled = distributions(seed, sharpness)
    got = TOPK[divergence](*inputs(pi, mu, sampled, k))
    for t in range(len(sampled)):
        named = {*mu[t].topk(k).indices.tolist(), sampled[t].item()}
        buckets = [[i] for i in named] + [[i for i in range(VOCABULARY) if i not in named]]
        p, m = ([math.fsum(math.exp(row[t, i]) for i in bucket) for bucket in buckets if bucket] for row in (pi, mu))
        pairs = list(zip(p, m, strict=True))
        expected = sum(abs(a - b) for a, b in pairs) / 2
        if divergence == "kl":
            expected = sum(b * math.log(b / a) for a, b in pairs)
        assert got[t].item() == pytest.approx(expected, rel=1e-4, abs=3e-6)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 100_000), sharpness=st.sampled_from([0.1, 1.0, 3.0]), divergence=st.sampled_from(["tv", "kl"])
)
def test_binary_is_at_most_topk_which_grows_with_k_up_to_the_exact_divergence(seed, sharpness, divergence):
    pi, mu, sampled = distributions(seed, sharpness)
    arguments = [inputs(pi, mu, sampled, k) for k in range(1, VOCABULARY + 1)]
    exact = exact_divergence(divergence, pi, mu).float()
    # What is left of 1 is known to float32's 1e-7 only, which log(mu / pi) shows where pi is small.
    rounding = 3e-6 + 3e-7 * (mu - pi).amax(-1).exp() * (divergence == "kl")
    ladder = [BINARY[divergence](*arguments[0][:2]), *(TOPK[divergence](*a) for a in arguments), exact]
    for lower, upper in itertools.pairwise(ladder):
        assert (lower <= upper + rounding).all()
    for whole in ladder[-3:-1]:  # k = V - 1 leaves one token to the rest bucket
        assert ((whole - exact).abs() <= rounding).all()
    alone = arguments[0][2].holds_sampled
    assert ((ladder[1] - ladder[0]).abs() <= rounding)[alone].all()


def test_topk_is_more_than_binary_where_the_other_tokens_move():
    pi, mu, sampled = distributions(0, 1.0, 200)
    arguments = inputs(pi, mu, sampled, 4)
    for name in TOPK:
        apart = TOPK[name](*arguments) - BINARY[name](*arguments[:2])
        held = arguments[2].holds_sampled
        assert (apart[held] > 1e-3).float().mean() > 0.5
        assert (apart[~held] > 1e-3).float().mean() > 0.5
        assert 0 < held.float().mean() < 1


def test_topk_at_the_edges():
    held, apart = torch.tensor([True]), torch.tensor([False])
    certain, never = torch.zeros(1, 1), torch.full((1, 1), -math.inf)
    half = torch.full((1, 1), -math.log(2))
    for divergence in TOPK.values():
        assert divergence(certain[0], certain[0], TopKLogprobs(certain, certain, held)).item() == 0
        assert divergence(half[0], half[0], TopKLogprobs(half, half, apart)).item() == pytest.approx(0, abs=1e-6)
        nothing = TopKLogprobs(torch.cat([half, never], 1), torch.cat([half, never], 1), held)
        assert divergence(half[0], half[0], nothing).item() == pytest.approx(0, abs=1e-6)
    # the whole of mu's token is gone, and the log-ratio is clamped
    gone = (never[0], certain[0], TopKLogprobs(never, certain, held))
    assert topk_tv_divergence(*gone).item() == pytest.approx(1, rel=1e-6)
    assert topk_kl_divergence(*gone).item() == pytest.approx(20, rel=1e-5)
    # mu is certain and pi is not: -log pi
    left = (half[0], certain[0], TopKLogprobs(half, certain, held))
    assert topk_kl_divergence(*left).item() == pytest.approx(math.log(2), rel=1e-5)


def test_what_the_top_k_leave_keeps_its_digits():
    policy, rollout = torch.tensor([-2e-6]), torch.tensor([-1e-6])
    topk = TopKLogprobs(policy[:, None], rollout[:, None], torch.tensor([True]))
    expected = reference_binary_kl(policy.item(), rollout.item())
    assert topk_kl_divergence(policy, rollout, topk).item() == pytest.approx(expected, rel=1e-3)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 100_000), k=st.integers(1, VOCABULARY), sharpness=st.sampled_from([1.0, 10.0, 40.0]))
def test_topk_divergences_are_in_range_and_zero_at_equality(seed, k, sharpness):
    pi, mu, sampled = distributions(seed, sharpness)
    tv, kl = (divergence(*inputs(pi, mu, sampled, k)) for divergence in TOPK.values())
    assert (tv >= 0).all()
    assert (tv <= 1 + 1e-6).all()
    assert (kl >= 0).all()
    assert kl.isfinite().all()
    for divergence in TOPK.values():
        torch.testing.assert_close(divergence(*inputs(mu, mu, sampled, k)), torch.zeros(20), rtol=0.0, atol=1e-6)
