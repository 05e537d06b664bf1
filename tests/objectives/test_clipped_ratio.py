"""PPO's clipped ratio: worked examples, the formula in float64, limits, settings."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_lightning.objectives import ClippedRatio, Unregularized

check = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "keep"),
    [
        # the range is [0.8, 1.28]
        (1.27, 2.0, 2.54, True),
        (1.29, 2.0, 2.56, False),
        (3.00, 2.0, 2.56, False),
        (0.81, -2.0, -1.62, True),
        (0.79, -2.0, -1.6, False),
        (0.10, -2.0, -1.6, False),
        # outside, against the advantage
        (3.00, -2.0, -6.0, True),
        (0.10, 2.0, 0.2, True),
        # inside, in either direction
        (1.10, -2.0, -2.2, True),
        (0.90, 2.0, 1.8, True),
    ],
)
def test_worked_by_hand(evaluate, ratio, advantage, objective, keep):
    got = evaluate(ClippedRatio(0.2, 0.28), math.log(0.25 * ratio), math.log(0.25), advantage)
    assert -got["loss"] == pytest.approx(objective, rel=1e-5)
    assert got["keep"] == keep
    assert got["grad_weight"] == pytest.approx(float(keep), rel=1e-6)
    assert got["grad_coefficient"] == pytest.approx(keep * ratio * advantage, rel=1e-5)
    assert got["grad"] == pytest.approx(keep * ratio * advantage, rel=1e-5)


@check
@given(seed=st.integers(0, 100_000), clip_low=st.floats(0.05, 0.9), clip_high=st.floats(0.05, 4))
def test_equals_a_float64_loop_over_the_formula(make_tokens, seed, clip_low, clip_high):
    tokens = make_tokens(seed)
    output = tokens.under(ClippedRatio(clip_low, clip_high))
    for i in tokens.completion_mask.nonzero().tolist():
        policy, rollout, advantage = (tensor[tuple(i)].item() for tensor in tokens[:3])
        ratio = math.exp(min(max(policy - rollout, -20.0), 20.0))
        objective = min(ratio * advantage, min(max(ratio, 1 - clip_low), 1 + clip_high) * advantage)
        assert -output.loss[tuple(i)].item() == pytest.approx(objective, rel=1e-5)
        edges = (abs(ratio - 1 + clip_low), abs(ratio - 1 - clip_high))
        if min(edges) < 1e-5 or abs(policy - rollout) > 20:
            continue
        clipped = (advantage > 0 and ratio > 1 + clip_high) or (advantage < 0 and ratio < 1 - clip_low)
        assert output.keep[tuple(i)].item() == (not clipped)
        expected = 0.0 if clipped else ratio * advantage
        assert output.grad_coefficient[tuple(i)].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("bound", "advantage"), [(1.5, 1.0), (0.5, -1.0)])
def test_a_ratio_at_the_bound_keeps_its_full_gradient(evaluate, bound, advantage):
    ratio = (torch.tensor([math.log(0.5 * bound)]) - torch.tensor([math.log(0.5)])).exp().item()
    clip_low, clip_high = (1 - ratio, 0.5) if bound < 1 else (0.5, ratio - 1)
    got = evaluate(ClippedRatio(clip_low, clip_high), math.log(0.5 * bound), math.log(0.5), advantage)
    assert got["keep"]
    assert got["grad"] == pytest.approx(ratio * advantage, rel=1e-6)
    assert got["grad_weight"] == pytest.approx(1, rel=1e-6)


def test_a_range_that_no_ratio_leaves_is_unregularized(make_tokens):
    tokens = make_tokens(5)
    inside = tokens.policy_logprobs >= tokens.rollout_logprobs - 0.1
    tokens = tokens._replace(completion_mask=tokens.completion_mask & inside)
    output, expected = tokens.under(ClippedRatio(0.999, 1e12)), tokens.under(Unregularized())
    assert torch.equal(output.loss, expected.loss)
    assert torch.equal(output.grad_coefficient, expected.grad_coefficient)
    assert torch.equal(output.keep, tokens.completion_mask)


def test_a_token_without_advantage_is_kept(evaluate):
    assert evaluate(ClippedRatio(), -0.1, -3.0, 0.0)["keep"]
    assert evaluate(ClippedRatio(), -3.0, -0.1, 0.0)["keep"]


def test_default_is_dapos_range():
    assert ClippedRatio() == ClippedRatio(clip_low=0.2, clip_high=0.28)


@pytest.mark.parametrize("bound", [0.0, 1.0, -0.2, math.nan])
def test_bad_clip_low_raises(bound):
    with pytest.raises(ValueError, match=rf"`clip_low` must be in \(0, 1\), got {bound}"):
        ClippedRatio(clip_low=bound)


@pytest.mark.parametrize("bound", [0.0, -0.2, math.nan])
def test_bad_clip_high_raises(bound):
    with pytest.raises(ValueError, match=rf"`clip_high` must be positive, got {bound}"):
        ClippedRatio(clip_high=bound)


def test_describe_names_the_range_of_the_ratio():
    assert "[0.8, 1.28]" in ClippedRatio().describe()
    assert "[0.5, 4]" in ClippedRatio(0.5, 3.0).describe()
