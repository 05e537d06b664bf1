"""GSPO: worked examples, the formula in float64, what a sequence is, limits, settings."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_lightning.objectives import GSPO, ClippedRatio, gspo

check = settings(max_examples=40, deadline=None, derandomize=True)


def on_sequences(objective, ratios, advantages):
    """Output and gradient on one sequence per row of ratios; NaN is no completion token."""
    ratio = torch.tensor(ratios)
    policy = torch.full_like(ratio, -0.5).requires_grad_()
    output = objective(
        policy,
        -0.5 - ratio.log(),
        torch.tensor(advantages)[:, None].expand_as(ratio),
        ratio.isfinite(),
        sequence_ids=torch.arange(len(ratio))[:, None].expand_as(ratio),
    )
    output.loss.sum().backward()
    return output, -policy.grad


def test_worked_by_hand():
    none = math.nan
    # geometric means 1, 2, 2, 1/2, 1/2 and the range [0.7, 1.5]
    ratios = [[2.0, 0.5, none], [4.0, 1.0, none], [2.0, 2.0, 2.0], [0.25, 1.0, 0.5], [0.5, none, none]]
    advantages = [3.0, 1.0, -2.0, -1.0, 4.0]
    output, grad = on_sequences(GSPO(0.3, 0.5), ratios, advantages)
    inside = torch.tensor(ratios).isfinite()
    objective = torch.tensor([3.0, 1.5, -4.0, -0.7, 2.0])[:, None].expand(5, 3)
    coefficient = torch.tensor([3.0, 0.0, -4.0, 0.0, 2.0])[:, None].expand(5, 3)
    torch.testing.assert_close(-output.loss, torch.where(inside, objective, 0.0))
    torch.testing.assert_close(output.grad_coefficient, torch.where(inside, coefficient, 0.0))
    torch.testing.assert_close(grad, torch.where(inside, coefficient, 0.0))
    weights = output.grad_weight
    torch.testing.assert_close(weights[0, :2], torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(weights[2], torch.ones(3))
    assert (weights[1, :2] == 0).all()
    assert output.keep.tolist() == [[True, True, False], [False] * 3, [True] * 3, [False] * 3, [True, False, False]]


@check
@given(seed=st.integers(0, 100_000), clip_low=st.floats(0.05, 0.9), clip_high=st.floats(0.05, 4))
def test_equals_a_float64_loop_over_the_formula(make_tokens, seed, clip_low, clip_high):
    tokens = make_tokens(seed)
    output = tokens.under(GSPO(clip_low, clip_high))
    log_ratios = {i: min(max(p - m, -20.0), 20.0) for i, p, m, _ in tokens.completion_tokens()}
    for i, policy, rollout, advantage in tokens.completion_tokens():
        own = [value for j, value in log_ratios.items() if j[0] == i[0]]
        ratio = math.exp(math.fsum(own) / len(own))
        objective = min(ratio * advantage, min(max(ratio, 1 - clip_low), 1 + clip_high) * advantage)
        assert -output.loss[i].item() == pytest.approx(objective, rel=1e-5)
        if min(abs(ratio - 1 + clip_low), abs(ratio - 1 - clip_high)) < 1e-5 or abs(policy - rollout) > 20:
            continue
        clipped = (advantage > 0 and ratio > 1 + clip_high) or (advantage < 0 and ratio < 1 - clip_low)
        expected = 0.0 if clipped else ratio * advantage
        assert output.keep[i].item() == (not clipped)
        assert output.grad_coefficient[i].item() == pytest.approx(expected, rel=1e-5)
        if advantage:
            weight = 0.0 if clipped else ratio / math.exp(log_ratios[i])
            assert output.grad_weight[i].item() == pytest.approx(weight, rel=2e-5)


@check
@given(seed=st.integers(0, 100_000))
def test_averaged_over_its_tokens_it_is_the_sequence_form(make_tokens, seed):
    tokens = make_tokens(seed)
    near = (tokens.policy_logprobs - tokens.rollout_logprobs).abs() < 20
    tokens = tokens._replace(
        completion_mask=tokens.completion_mask & near, advantages=tokens.advantages[:, :1] + 0 * tokens.advantages
    )
    mask, lengths = tokens.completion_mask, tokens.completion_mask.sum(1).clamp(min=1)
    policy = tokens.policy_logprobs.clone().requires_grad_()
    token_form = (-tokens._replace(policy_logprobs=policy).under(GSPO(0.3, 0.5)).loss.sum(1) / lengths)[mask.any(1)]
    exact = tokens.policy_logprobs.double().requires_grad_()
    s = (torch.where(mask, exact - tokens.rollout_logprobs, 0.0).sum(1) / lengths).exp()
    advantage = tokens.advantages[:, 0].double()
    sequence_form = torch.minimum(s * advantage, s.clamp(0.7, 1.5) * advantage)[mask.any(1)]
    torch.testing.assert_close(token_form.double(), sequence_form, rtol=1e-4, atol=1e-7)
    token_form.sum().backward()
    sequence_form.sum().backward()
    torch.testing.assert_close(policy.grad.double(), exact.grad, rtol=1e-4, atol=1e-7)


def test_a_sequence_is_told_by_its_number_wherever_its_tokens_stand(make_tokens):
    tokens = make_tokens(4, (40,))._replace(sequence_ids=torch.arange(40) % 3)
    output = tokens.under(GSPO(0.3, 0.5))
    for order in (tokens.sequence_ids.argsort(), torch.arange(39, -1, -1)):
        moved = tokens.map(lambda tensor, order=order: tensor[order]).under(GSPO(0.3, 0.5))
        torch.testing.assert_close(moved.loss, output.loss[order], rtol=1e-5, atol=1e-6)
    renumbered = tokens._replace(sequence_ids=7 * (2 - tokens.sequence_ids)).under(GSPO(0.3, 0.5))
    torch.testing.assert_close(renumbered.loss, output.loss, rtol=1e-5, atol=1e-6)


def test_what_stands_outside_the_completion_does_not_count_in_the_function_itself(make_tokens):
    tokens = make_tokens(3)
    mask = tokens.completion_mask
    terms = [
        gspo(policy, *tokens[1:5], clip_low=0.3, clip_high=0.5)
        for policy in (tokens.policy_logprobs, torch.where(mask, tokens.policy_logprobs, -3.0))
    ]
    for a, b in zip(*terms, strict=True):
        assert torch.equal(a[mask], b[mask])


def test_the_lengths_of_sequences_may_differ():
    # the same ratios in a longer sequence have the same geometric mean
    short, _ = on_sequences(GSPO(0.3, 0.5), [[1.2, 0.9]], [1.0])
    long, _ = on_sequences(GSPO(0.3, 0.5), [[1.2, 0.9, 1.2, 0.9]], [1.0])
    torch.testing.assert_close(long.loss[:, :2], short.loss)


def test_with_one_token_per_sequence_it_is_the_clipped_ratio(make_tokens):
    tokens = make_tokens(5, (200,))._replace(sequence_ids=torch.arange(200))
    (output, grad), (expected, expected_grad) = (
        tokens.under_with_gradient(objective) for objective in (GSPO(0.2, 0.28), ClippedRatio(0.2, 0.28))
    )
    for name in ("loss", "grad_coefficient", "grad_weight", "keep"):
        assert torch.equal(getattr(output, name).nan_to_num(), getattr(expected, name).nan_to_num())
    torch.testing.assert_close(grad, expected_grad, rtol=1e-6, atol=0.0)


def test_defaults_are_the_papers():
    assert GSPO() == GSPO(clip_low=3e-4, clip_high=4e-4)


@pytest.mark.parametrize("bound", [0.0, 1.0, -0.2, math.nan])
def test_bad_clip_low_raises(bound):
    with pytest.raises(ValueError, match=rf"`clip_low` must be in \(0, 1\), got {bound}"):
        GSPO(clip_low=bound)


@pytest.mark.parametrize("bound", [0.0, -0.2, math.nan])
def test_bad_clip_high_raises(bound):
    with pytest.raises(ValueError, match=rf"`clip_high` must be positive, got {bound}"):
        GSPO(clip_high=bound)


def test_describe_names_the_range_of_the_ratio():
    assert "[0.9997, 1.0004]" in GSPO().describe()
