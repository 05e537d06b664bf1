"""Top-K DPPO: worked examples, the formula in float64, the edge of the mask, settings."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_lightning.functional import TopKLogprobs, topk_kl_divergence, topk_tv_divergence
from drpo_lightning.objectives import DPPO, TopKDPPO, Unregularized

LEAST = 2.0**-24
"""What the rest bucket holds at least."""


def reference_divergence(divergence, policy, rollout, topk):
    """TV or KL over the top K, the sampled token and the rest, of one token."""
    pi, mu = ([math.exp(value) for value in row.tolist()] for row in topk[:2])
    if not topk.holds_sampled:
        pi.append(math.exp(policy))
        mu.append(math.exp(rollout))
    pi.append(max(1 - math.fsum(pi), LEAST))
    mu.append(max(1 - math.fsum(mu), LEAST))
    if divergence == "tv":
        return math.fsum(abs(p - m) for p, m in zip(pi, mu, strict=True)) / 2
    terms = (m * min(max(math.log(m / p), -20.0), 20.0) if p else 20 * m for p, m in zip(pi, mu, strict=True) if m)
    return max(math.fsum(terms), 0.0)


def on_three_tokens(objective, pi, mu, sampled, likely, advantage):
    """Output on a token of a vocabulary of three, with the tokens of the top K given."""
    pi, mu = torch.tensor(pi).log(), torch.tensor(mu).log()
    policy = pi[sampled].clone().requires_grad_()
    topk = TopKLogprobs(pi[likely], mu[likely], torch.tensor(sampled in likely))
    output = objective(policy, mu[sampled], torch.tensor(advantage), torch.tensor(True), topk=topk)
    output.loss.backward()
    return output, -policy.grad.item()


@pytest.mark.parametrize(
    ("divergence", "sampled", "likely", "advantage", "threshold", "keep"),
    [
        # mu = (0.4, 0.4, 0.2), pi = (0.1, 0.6, 0.3): TV of {0}, {2}, rest is 0.3, that of {2}, rest 0.1
        ("tv", 2, [0], 1.0, 0.29, False),
        ("tv", 2, [0], 1.0, 0.31, True),
        ("tv", 2, [0], -1.0, 0.29, True),
        ("tv", 2, [2], 1.0, 0.09, False),
        ("tv", 2, [2], 1.0, 0.11, True),
        ("tv", 0, [0, 1], -1.0, 0.29, False),
        # 0.4 log 4 + 0.2 log(2/3) + 0.4 log(2/3) = 0.3112
        ("kl", 2, [0], 1.0, 0.31, False),
        ("kl", 2, [0], 1.0, 0.312, True),
        # 0.2 log(2/3) + 0.8 log(8/7) = 0.0257
        ("kl", 2, [2], 1.0, 0.025, False),
        ("kl", 2, [2], 1.0, 0.026, True),
        ("kl", 2, [2], -1.0, 0.025, True),
    ],
)
def test_worked_by_hand(divergence, sampled, likely, advantage, threshold, keep):
    pi, mu = [0.1, 0.6, 0.3], [0.4, 0.4, 0.2]
    objective = TopKDPPO(len(likely), divergence, threshold)
    output, grad = on_three_tokens(objective, pi, mu, sampled, likely, advantage)
    expected = keep * pi[sampled] / mu[sampled] * advantage
    assert output.keep.item() == keep
    assert -output.loss.item() == pytest.approx(expected, rel=1e-5)
    assert output.grad_coefficient.item() == pytest.approx(expected, rel=1e-5)
    assert grad == pytest.approx(expected, rel=1e-5)
    assert output.grad_weight.item() == pytest.approx(float(keep), rel=1e-5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 100_000),
    divergence=st.sampled_from(["tv", "kl"]),
    threshold=st.sampled_from([0.01, 0.05, 0.15, 0.6]),
)
def test_equals_a_float64_loop_over_the_formula(make_tokens, seed, divergence, threshold):
    tokens = make_tokens(seed)
    output = tokens.under(TopKDPPO(4, divergence, threshold))
    for i, policy, rollout, advantage in tokens.completion_tokens():
        distance = reference_divergence(divergence, policy, rollout, TopKLogprobs(*(t[i] for t in tokens.topk)))
        if abs(distance - threshold) < 1e-4:
            continue
        masked = distance > threshold and ((advantage > 0 and policy > rollout) or (advantage < 0 and policy < rollout))
        expected = 0.0 if masked else math.exp(min(max(policy - rollout, -20.0), 20.0)) * advantage
        assert output.keep[i].item() == (not masked)
        assert -output.loss[i].item() == pytest.approx(expected, rel=1e-5)
        if abs(policy - rollout) <= 20:
            assert output.grad_coefficient[i].item() == pytest.approx(expected, rel=1e-5)
            if advantage:
                assert output.grad_weight[i].item() == pytest.approx(float(not masked), rel=1e-6)


@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_a_divergence_equal_to_the_threshold_is_kept(divergence):
    pi, mu = torch.tensor([0.1, 0.6, 0.3]).log(), torch.tensor([0.4, 0.4, 0.2]).log()
    topk = TopKLogprobs(pi[:1], mu[:1], torch.tensor(False))
    function = {"tv": topk_tv_divergence, "kl": topk_kl_divergence}[divergence]
    distance = function(pi[2], mu[2], topk).item()
    below = torch.nextafter(torch.tensor(distance), torch.tensor(0.0)).item()
    for threshold, keep in ((distance, True), (below, False)):
        output, _ = on_three_tokens(TopKDPPO(1, divergence, threshold), [0.1, 0.6, 0.3], [0.4, 0.4, 0.2], 2, [0], 1.0)
        assert output.keep.item() == keep


@pytest.mark.parametrize(("divergence", "threshold"), [("tv", 1.001), ("kl", math.inf)])
def test_a_threshold_that_cannot_be_reached_is_unregularized(make_tokens, divergence, threshold):
    tokens = make_tokens(5)
    output, expected = tokens.under(TopKDPPO(4, divergence, threshold)), tokens.under(Unregularized())
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(output.grad_coefficient, expected.grad_coefficient)
    assert torch.equal(output.keep, tokens.completion_mask)


@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_it_keeps_only_what_the_binary_mask_keeps(make_tokens, divergence):
    tokens = make_tokens(9)
    topk = tokens.under(TopKDPPO(4, divergence, 0.15)).keep
    binary = tokens.under(DPPO(f"binary_{divergence}", 0.15)).keep
    assert (topk <= binary).all()
    assert (topk != binary).any()


def test_defaults_are_the_papers():
    assert TopKDPPO() == TopKDPPO(k=20, divergence="tv")
    assert TopKDPPO().radius == 0.15
    assert TopKDPPO(divergence="kl").radius == 0.05
    assert TopKDPPO(threshold=0.3).radius == 0.3
    assert TopKDPPO(7).num_topk == 7


def test_the_default_threshold_is_the_one_in_use(make_tokens):
    tokens = make_tokens(2)
    for divergence, threshold in (("tv", 0.15), ("kl", 0.05)):
        default, explicit = (tokens.under(TopKDPPO(4, divergence, value)) for value in (None, threshold))
        assert torch.equal(default.loss, explicit.loss)


@pytest.mark.parametrize("threshold", [0.0, -0.1, math.nan])
def test_bad_threshold_raises(threshold):
    with pytest.raises(ValueError, match=rf"`threshold` must be positive, got {threshold}"):
        TopKDPPO(threshold=threshold)


@pytest.mark.parametrize("k", [0, -3])
def test_bad_k_raises(k):
    with pytest.raises(ValueError, match=rf"`k` must be at least 1, got {k}"):
        TopKDPPO(k)


@pytest.mark.usefixtures("unchecked_hints")
def test_unknown_divergence_raises():
    with pytest.raises(ValueError, match=r"`divergence` must be one of \['kl', 'tv'\], got 'binary_tv'"):
        TopKDPPO(divergence="binary_tv")


def test_describe_names_k_divergence_threshold_and_unit():
    assert "TopKDPPO(k=20, tv, threshold=0.15 in units of probability)" in TopKDPPO().describe()
    assert "kl, threshold=0.05 nats" in TopKDPPO(divergence="kl").describe()
