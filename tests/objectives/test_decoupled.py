"""The decoupled form: worked examples, the formula in float64, limits, settings."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_lightning.objectives import (
    CISPO,
    DPPO,
    DRPO,
    GSPO,
    SAPO,
    SPO,
    ClippedRatio,
    Decoupled,
    DivergencePenalty,
    MaskDRPO,
    TopKDPPO,
    Unregularized,
)

INNER = [
    ClippedRatio(),
    DRPO(0.2),
    DRPO(0.2, scale_by_advantage=False),
    MaskDRPO(0.2),
    SPO(0.3),
    DPPO("binary_tv"),
    DPPO("binary_kl"),
    GSPO(0.3, 0.5),
    CISPO(),
    SAPO(),
    DivergencePenalty("k3"),
    Unregularized(),
]


@pytest.mark.parametrize(
    ("inner", "max_ratio", "proximal", "advantage", "objective", "weight"),
    [
        # pi = 0.5, mu = 0.25. pi_prox = 0.4: pi / pi_prox = 1.25, pi_prox / mu = 1.6
        (ClippedRatio(), None, 0.4, 1.0, 1.6 * 1.25, 1.0),
        (ClippedRatio(), 1.5, 0.4, 1.0, 1.5 * 1.25, 1.5 / 1.6),
        (DRPO(0.2), None, 0.4, 1.0, 1.6 * (1.25 - 0.4 * 0.0625 / 0.4), 0.5),
        (DRPO(0.2), 1.5, 0.4, 1.0, 1.5 * (1.25 - 0.4 * 0.0625 / 0.4), 0.5 * 1.5 / 1.6),
        # pi_prox = 0.3: pi / pi_prox = 5/3 is clipped to 1.28, pi_prox / mu = 1.2
        (ClippedRatio(), None, 0.3, 1.0, 1.2 * 1.28, 0.0),
        (ClippedRatio(), None, 0.3, -1.0, -2.0, 1.0),
        # pi_prox = 0.2: pi_prox / mu = 0.8 is not cut
        (Unregularized(), 1.0, 0.2, 3.0, 6.0, 1.0),
        (Unregularized(), 1.0, 0.5, 3.0, 3.0, 0.5),
    ],
)
def test_worked_by_hand(evaluate, inner, max_ratio, proximal, advantage, objective, weight):
    got = evaluate(Decoupled(inner, max_ratio), math.log(0.5), math.log(0.25), advantage, math.log(proximal))
    assert -got["loss"] == pytest.approx(objective, rel=1e-5)
    assert got["grad_weight"] == pytest.approx(weight, rel=1e-5, abs=1e-6)
    for name in ("grad_coefficient", "grad"):
        assert got[name] == pytest.approx(2 * advantage * weight, rel=1e-5, abs=1e-6)
    assert got.get("keep", True) == (weight != 0)


def inner_reference(inner, ratio, anchor, advantage):
    """J and dJ / d log pi of one token, from pi / pi_prox and pi_prox; None at the edge of a range."""
    if isinstance(inner, DRPO):
        penalty = abs(advantage) * anchor * (ratio - 1) ** 2 / (2 * inner.delta)
        slope = abs(advantage) * anchor * (ratio - 1) * ratio / inner.delta
        return ratio * advantage - penalty, ratio * advantage - slope
    low, high = 1 - inner.clip_low, 1 + inner.clip_high
    if min(abs(ratio - low), abs(ratio - high)) < 1e-5:
        return None
    clipped = (advantage > 0 and ratio > high) or (advantage < 0 and ratio < low)
    return min(ratio * advantage, min(max(ratio, low), high) * advantage), 0.0 if clipped else ratio * advantage


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 100_000),
    inner=st.one_of(st.floats(0.05, 20).map(DRPO), st.builds(ClippedRatio, st.floats(0.05, 0.9), st.floats(0.05, 4))),
    max_ratio=st.one_of(st.none(), st.floats(1, 10)),
)
def test_equals_a_float64_loop_over_the_formula(make_tokens, seed, inner, max_ratio):
    tokens = make_tokens(seed)
    output = tokens.under(Decoupled(inner, max_ratio))
    for i, policy, rollout, advantage in tokens.completion_tokens():
        proximal = tokens.proximal_logprobs[i].item()
        factor = min(math.exp(min(max(proximal - rollout, -20.0), 20.0)), max_ratio or math.inf)
        ratio = math.exp(min(max(policy - proximal, -20.0), 20.0))
        reference = inner_reference(inner, ratio, math.exp(proximal), advantage)
        if reference is None:
            continue
        objective, slope = (factor * value for value in reference)
        size = factor * abs(advantage) * (ratio + abs(reference[0]) / (abs(advantage) or 1.0))
        assert -output.loss[i].item() == pytest.approx(objective, rel=5e-5, abs=2e-5 * size)
        within = abs(policy - rollout) <= 20 and abs(policy - proximal) <= 20
        expected = pytest.approx(slope * within, rel=5e-5, abs=2e-5 * size)
        assert output.grad_coefficient[i].item() == expected
        if advantage and within:
            r = math.exp(policy - rollout)
            weight = pytest.approx(slope / (r * advantage), rel=1e-4, abs=1e-4 * size / (r * abs(advantage)))
            assert output.grad_weight[i].item() == weight


@pytest.mark.parametrize("inner", INNER, ids=lambda inner: type(inner).__name__)
@pytest.mark.parametrize("max_ratio", [None, 1.0])
def test_with_pi_prox_at_mu_it_is_the_inner_objective(make_tokens, inner, max_ratio):
    tokens = make_tokens(5)
    tokens = tokens._replace(proximal_logprobs=tokens.rollout_logprobs)
    (output, grad), (expected, expected_grad) = (
        tokens.under_with_gradient(objective) for objective in (Decoupled(inner, max_ratio), inner)
    )
    assert torch.equal(grad, expected_grad)
    assert (output.keep is None) == (expected.keep is None)
    for a, b in zip(output, expected, strict=True):
        if a is not None:
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_without_a_region_it_is_unregularized_whatever_pi_prox_is(make_tokens):
    tokens = make_tokens(5)
    far = (tokens.policy_logprobs - tokens.proximal_logprobs).abs() > 20
    far |= (tokens.proximal_logprobs - tokens.rollout_logprobs).abs() > 20
    tokens = tokens._replace(completion_mask=tokens.completion_mask & ~far)
    (output, grad), (expected, expected_grad) = (
        tokens.under_with_gradient(objective) for objective in (Decoupled(Unregularized()), Unregularized())
    )
    reached = ~expected.beyond_clamp
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(output.loss[reached], expected.loss[reached], rtol=1e-5, atol=0.0)
    torch.testing.assert_close(output.grad_weight, expected.grad_weight, rtol=1e-5, atol=0.0, equal_nan=True)


def test_the_region_is_around_pi_prox(evaluate):
    # pi is 0.25 from mu, and at pi_prox: nothing to clip, fade out or mask
    for inner in (ClippedRatio(), DRPO(0.2), DPPO(), GSPO()):
        got = evaluate(Decoupled(inner), math.log(0.5), math.log(0.25), 1.0, math.log(0.5))
        assert got["grad_weight"] == pytest.approx(1, rel=1e-6)
        assert evaluate(inner, math.log(0.5), math.log(0.25), 1.0)["grad_weight"] < 0.5


def test_a_token_out_of_reach_of_pi_prox_has_no_gradient(evaluate):
    got = evaluate(Decoupled(Unregularized()), -10.0, -10.0, 1.0, -31.0)
    assert got["grad"] == got["grad_coefficient"] == got["grad_weight"] == 0
    assert not got["beyond_clamp"]


def test_it_asks_for_what_its_objective_asks_for():
    assert Decoupled(GSPO()).required_inputs == {"proximal_logprobs", "sequence_ids"}
    assert Decoupled(DRPO()).num_topk == 0
    assert [Decoupled(inner).has_mask for inner in (DRPO(), DPPO())] == [False, True]


@pytest.mark.parametrize(
    ("inner", "needs"), [(TopKDPPO(), r"\['topk'\]"), (Decoupled(DRPO()), r"\['proximal_logprobs'\]")]
)
def test_an_objective_without_a_decoupled_form_is_refused(inner, needs):
    name = type(inner).__name__
    with pytest.raises(ValueError, match=rf"`objective` {name} has no decoupled form: it needs {needs}"):
        Decoupled(inner)


@pytest.mark.parametrize("max_ratio", [0.99, 0.0, math.nan])
def test_bad_max_ratio_raises(max_ratio):
    with pytest.raises(ValueError, match=rf"`max_ratio` must be at least 1, got {max_ratio}"):
        Decoupled(DRPO(), max_ratio)


def test_describe_names_the_inner_objective_and_the_cut():
    assert Decoupled(DRPO(0.2)).describe().endswith(DRPO(0.2).describe())
    assert "cut" not in Decoupled(DRPO(0.2)).describe()
    assert "pi_prox / mu cut at 2" in Decoupled(DRPO(0.2), 2.0).describe()
