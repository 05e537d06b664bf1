"""DPPO: worked examples, the formula in float64, the edge of the mask, settings."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_lightning.functional import binary_kl_divergence, binary_tv_divergence
from drpo_lightning.objectives import DPPO, Unregularized

check = settings(max_examples=60, deadline=None, derandomize=True)
DIVERGENCES = {"binary_tv": binary_tv_divergence, "binary_kl": binary_kl_divergence}


def reference_divergence(divergence, policy, rollout):
    """|pi - mu| or KL(Bern(mu) || Bern(pi)) of one token, log pi within 20 nats of log mu."""
    policy = min(max(policy, rollout - 20), rollout + 20)
    if divergence == "binary_kl":
        policy = min(policy, -(2.0**-24))  # as certain as float32 can be
    if divergence == "binary_tv":
        return abs(math.exp(policy) - math.exp(rollout))
    chosen = math.exp(rollout) * (rollout - policy)
    rest_mu, rest_pi = -math.expm1(rollout), -math.expm1(policy)
    if rest_mu == 0:
        return chosen
    return chosen + rest_mu * math.log(rest_mu / rest_pi)


@pytest.mark.parametrize(
    ("pi", "mu", "advantage", "threshold", "keep"),
    [
        (0.50, 0.25, 1.0, 0.15, False),
        (0.50, 0.25, -1.0, 0.15, True),
        (0.25, 0.50, 1.0, 0.15, True),
        (0.25, 0.50, -1.0, 0.15, False),
        (0.39, 0.25, 2.0, 0.15, True),
        (0.41, 0.25, 2.0, 0.15, False),
        (0.41, 0.25, 2.0, 0.20, True),
        (0.11, 0.25, -2.0, 0.15, True),
        (0.09, 0.25, -2.0, 0.15, False),
        # a hundredfold ratio, and a small shift
        (0.10, 0.001, 1.0, 0.15, True),
    ],
)
def test_binary_tv_worked_by_hand(evaluate, pi, mu, advantage, threshold, keep):
    got = evaluate(DPPO("binary_tv", threshold), math.log(pi), math.log(mu), advantage)
    expected = keep * pi / mu * advantage
    assert got["keep"] == keep
    assert got["grad_weight"] == pytest.approx(float(keep), rel=1e-5)
    assert -got["loss"] == pytest.approx(expected, rel=1e-5)
    assert got["grad_coefficient"] == pytest.approx(expected, rel=1e-5)
    assert got["grad"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("pi", "mu", "advantage", "threshold", "keep"),
    [
        # KL(Bern(1/4) || Bern(1/2)) = 0.1308, KL(Bern(1/2) || Bern(1/4)) = 0.1438
        (0.50, 0.25, 1.0, 0.13, False),
        (0.50, 0.25, 1.0, 0.132, True),
        (0.50, 0.25, -1.0, 0.13, True),
        (0.25, 0.50, -1.0, 0.14, False),
        (0.25, 0.50, -1.0, 0.145, True),
        (0.25, 0.50, 1.0, 0.14, True),
    ],
)
def test_binary_kl_worked_by_hand(evaluate, pi, mu, advantage, threshold, keep):
    got = evaluate(DPPO("binary_kl", threshold), math.log(pi), math.log(mu), advantage)
    assert got["keep"] == keep
    assert got["grad"] == pytest.approx(keep * pi / mu * advantage, rel=1e-5)


@check
@given(
    seed=st.integers(0, 100_000),
    divergence=st.sampled_from(["binary_tv", "binary_kl"]),
    threshold=st.sampled_from([0.01, 0.05, 0.15, 0.6]),
)
def test_equals_a_float64_loop_over_the_formula(make_tokens, seed, divergence, threshold):
    tokens = make_tokens(seed)
    output = tokens.under(DPPO(divergence, threshold))
    for i in tokens.completion_mask.nonzero().tolist():
        policy, rollout, advantage = (tensor[tuple(i)].item() for tensor in tokens[:3])
        distance = reference_divergence(divergence, policy, rollout)
        if abs(distance - threshold) < 1e-4:
            continue
        masked = distance > threshold and ((advantage > 0 and policy > rollout) or (advantage < 0 and policy < rollout))
        ratio = math.exp(min(max(policy - rollout, -20.0), 20.0))
        expected = 0.0 if masked else ratio * advantage
        assert output.keep[tuple(i)].item() == (not masked)
        assert -output.loss[tuple(i)].item() == pytest.approx(expected, rel=1e-5)
        if abs(policy - rollout) <= 20:
            assert output.grad_coefficient[tuple(i)].item() == pytest.approx(expected, rel=1e-5)
            if advantage:
                assert output.grad_weight[tuple(i)].item() == pytest.approx(float(not masked), rel=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(("policy", "rollout", "advantage"), [(-0.5, -1.0, 1.0), (-1.0, -0.5, -1.0)])
def test_a_divergence_equal_to_the_threshold_is_kept(evaluate, divergence, policy, rollout, advantage):
    distance = DIVERGENCES[divergence](torch.tensor([policy]), torch.tensor([rollout])).item()
    assert evaluate(DPPO(divergence, distance), policy, rollout, advantage)["keep"]
    below = torch.nextafter(torch.tensor(distance), torch.tensor(0.0)).item()
    assert not evaluate(DPPO(divergence, below), policy, rollout, advantage)["keep"]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("threshold", [1e-3, 10.0])
def test_a_token_without_advantage_is_kept(evaluate, divergence, threshold):
    assert evaluate(DPPO(divergence, threshold), -0.1, -3.0, 0.0)["keep"]


@pytest.mark.parametrize(
    ("divergence", "threshold"), [("binary_tv", 1.001), ("binary_tv", 1e6), ("binary_kl", math.inf)]
)
def test_a_threshold_that_cannot_be_reached_is_unregularized(make_tokens, divergence, threshold):
    tokens = make_tokens(5)
    output, expected = tokens.under(DPPO(divergence, threshold)), tokens.under(Unregularized())
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(output.grad_coefficient, expected.grad_coefficient)
    assert torch.equal(output.grad_weight.nan_to_num(), expected.grad_weight.nan_to_num())
    assert torch.equal(output.keep, tokens.completion_mask)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_threshold_of_almost_nothing_masks_every_diverging_token(make_tokens, divergence):
    tokens = make_tokens(5)
    output = tokens.under(DPPO(divergence, 1e-30))
    distance = DIVERGENCES[divergence](tokens.policy_logprobs, tokens.rollout_logprobs)
    diverging = (tokens.advantages * (tokens.policy_logprobs - tokens.rollout_logprobs) > 0) & (distance > 1e-30)
    assert torch.equal(output.keep, tokens.completion_mask & ~diverging)
    assert diverging[tokens.completion_mask].any()


def test_defaults_are_the_papers():
    assert DPPO() == DPPO("binary_tv")
    assert DPPO().radius == 0.15
    assert DPPO("binary_kl").radius == 0.05
    assert DPPO("binary_kl", 0.3).radius == 0.3


def test_the_default_threshold_is_the_one_in_use(make_tokens):
    tokens = make_tokens(2)
    for divergence, threshold in (("binary_tv", 0.15), ("binary_kl", 0.05)):
        default, explicit = tokens.under(DPPO(divergence)), tokens.under(DPPO(divergence, threshold))
        assert torch.equal(default.loss, explicit.loss)


@pytest.mark.parametrize("threshold", [0.0, -0.1, math.nan])
def test_bad_threshold_raises(threshold):
    with pytest.raises(ValueError, match=rf"`threshold` must be positive, got {threshold}"):
        DPPO("binary_tv", threshold)


@pytest.mark.usefixtures("unchecked_hints")
def test_unknown_divergence_raises():
    with pytest.raises(ValueError, match=r"`divergence` must be one of \['binary_kl', 'binary_tv'\], got 'topk_tv'"):
        DPPO("topk_tv")


def test_describe_names_divergence_threshold_and_unit():
    assert "binary_tv, threshold=0.15 in units of probability" in DPPO().describe()
    assert "binary_kl, threshold=0.05 nats" in DPPO("binary_kl").describe()
    assert "threshold=0.6" in DPPO("binary_tv", 0.6).describe()
