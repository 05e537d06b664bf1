"""What holds for every objective."""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import ClassVar, final

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_lightning.objectives import DPPO, DRPO, ClippedRatio, Objective, TokenTerms, Unregularized

SEEDS = st.integers(0, 100_000)
PER_TOKEN = ("loss", "grad_coefficient", "grad_weight", "beyond_clamp", "keep")
SETTINGS = st.one_of(
    st.floats(0.05, 20).map(DRPO),
    st.builds(DPPO, st.sampled_from(["binary_tv", "binary_kl"]), st.one_of(st.none(), st.floats(0.01, 2))),
    st.builds(ClippedRatio, st.floats(0.01, 0.9), st.floats(0.01, 5)),
    st.just(Unregularized()),
)
check = settings(max_examples=60, deadline=None, derandomize=True)


def with_gradient(objective, tokens):
    policy = tokens.policy_logprobs.clone().requires_grad_()
    output = objective(policy, *tokens[1:])
    output.loss.sum().backward()
    return output, policy.grad


def exact_log_ratio(tokens):
    return (tokens.policy_logprobs - tokens.rollout_logprobs).double()


def assert_same_output(got, expected):
    for name in PER_TOKEN:
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a.isnan(), b.isnan())
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), name


def assert_gradient_is_analytic(objective, tokens):
    output, grad = with_gradient(objective, tokens)
    inside = tokens.completion_mask & (exact_log_ratio(tokens).abs() <= 20)
    ratio = exact_log_ratio(tokens).clamp(-20, 20).exp()
    scale = ratio * tokens.advantages
    error = (-grad - output.grad_coefficient).abs()
    assert (error <= 1e-4 * scale.abs() + 5e-7 * tokens.advantages.abs()).all()
    assert (grad[~inside] == 0).all()
    assert (output.grad_coefficient[~inside] == 0).all()
    weighted = inside & (tokens.advantages != 0)
    from_coefficient = output.grad_coefficient.double() / scale
    torch.testing.assert_close(output.grad_weight[weighted].double(), from_coefficient[weighted], rtol=1e-4, atol=1e-4)
    # A weight is read off a gradient only where the gradient is not lost in rounding.
    weighted &= ratio > 1e-2
    from_autograd = -grad.double() / scale
    torch.testing.assert_close(output.grad_weight[weighted].double(), from_autograd[weighted], rtol=1e-4, atol=1e-4)


@check
@given(seed=SEEDS)
def test_autograd_equals_the_analytic_coefficient_and_weight(objective, make_tokens, seed):
    assert_gradient_is_analytic(objective, make_tokens(seed))


@check
@given(chosen=SETTINGS, seed=SEEDS)
def test_autograd_equals_the_analytic_coefficient_and_weight_for_any_setting(make_tokens, chosen, seed):
    assert_gradient_is_analytic(chosen, make_tokens(seed))


@check
@given(seed=SEEDS)
def test_tokens_beyond_the_clamp_are_flagged_and_have_no_gradient(objective, make_tokens, seed):
    tokens = make_tokens(seed)
    output, grad = with_gradient(objective, tokens)
    beyond = tokens.completion_mask & (exact_log_ratio(tokens).abs() > 20)
    assert torch.equal(output.beyond_clamp, beyond)
    assert (output.grad_coefficient[beyond] == 0).all()
    assert (output.grad_weight[beyond & (tokens.advantages != 0)] == 0).all()
    assert (grad[beyond] == 0).all()
    assert output.loss.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize(
    ("policy", "rollout", "advantage", "beyond"),
    [
        (0.0, -20.0, -1.5, False),
        (0.0, -20.0 - 2e-6, -1.5, True),
        (-20.0, 0.0, 1.5, False),
        (-20.0 - 2e-6, 0.0, 1.5, True),
        (-0.5, -15.5, -1.5, False),
        (-15.5, -0.5, 1.5, False),
        (-math.inf, -0.5, 1.5, True),
        (-0.5, -100.5, -1.5, True),
    ],
)
def test_the_edge_of_the_clamp_is_at_twenty_nats(objective, evaluate, policy, rollout, advantage, beyond):
    # converging tokens, so that no objective masks them
    got = evaluate(objective, policy, rollout, advantage)
    assert got["beyond_clamp"] == beyond
    assert (got["grad"] == 0) == (got["grad_coefficient"] == 0) == (got["grad_weight"] == 0) == beyond
    assert math.isfinite(got["loss"])


@check
@given(seed=SEEDS)
def test_weight_is_nan_exactly_where_the_advantage_is_zero_or_outside_the_completion(objective, make_tokens, seed):
    tokens = make_tokens(seed)
    output = objective(*tokens)
    assert torch.equal(output.grad_weight.isnan(), ~tokens.completion_mask | (tokens.advantages == 0))
    zero = tokens.completion_mask & (tokens.advantages == 0)
    assert (output.grad_coefficient[zero] == 0).all()
    assert (output.loss[zero] == 0).all()
    assert not output.grad_coefficient.isnan().any()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30, -1e30])
@pytest.mark.parametrize("field", ["policy_logprobs", "rollout_logprobs", "advantages", "all"])
def test_garbage_outside_the_completion_changes_nothing(objective, make_tokens, garbage, field):
    tokens = make_tokens(7)
    mask = tokens.completion_mask.clone()
    mask[0], mask[1] = False, True
    clean = tokens._replace(completion_mask=mask)
    fields = tokens._fields[:3] if field == "all" else [field]
    dirty = clean._replace(**{name: torch.where(mask, getattr(clean, name), garbage) for name in fields})
    expected, expected_grad = with_gradient(objective, clean)
    output, grad = with_gradient(objective, dirty)
    assert_same_output(output, expected)
    assert torch.equal(grad, expected_grad)
    for outside in (grad[~mask], output.loss[~mask], output.grad_coefficient[~mask]):
        assert (outside == 0).all()
    assert not output.beyond_clamp[~mask].any()
    assert output.keep is None or not output.keep[~mask].any()


def test_only_the_policy_gets_a_gradient(objective, make_tokens):
    tokens = make_tokens(3)
    leaves = [tensor.clone().requires_grad_() for tensor in tokens[:3]]
    proximal = tokens.policy_logprobs.clone().requires_grad_()
    output = objective(*leaves, tokens.completion_mask, proximal_logprobs=proximal)
    output.loss.sum().backward()
    assert leaves[0].grad.abs().sum() > 0
    assert [leaf.grad for leaf in (*leaves[1:], proximal)] == [None] * 3
    assert output.loss.requires_grad
    assert not output.grad_coefficient.requires_grad
    assert not output.grad_weight.requires_grad


@check
@given(seed=SEEDS)
def test_on_policy_the_gradient_is_the_advantage(objective, make_tokens, seed):
    tokens = make_tokens(seed)
    tokens = tokens._replace(policy_logprobs=tokens.rollout_logprobs)
    output, grad = with_gradient(objective, tokens)
    expected = torch.where(tokens.completion_mask, tokens.advantages, 0.0)
    torch.testing.assert_close(-grad, expected, rtol=1e-6, atol=0.0)
    assert torch.equal(output.grad_coefficient, expected)
    assert torch.equal(output.loss, -expected)
    assert output.grad_weight.nan_to_num(1.0).eq(1).all()
    assert output.keep is None or torch.equal(output.keep, tokens.completion_mask)


@check
@given(seed=SEEDS)
def test_padded_packed_and_single_tokens_give_the_same(objective, make_tokens, seed):
    tokens = make_tokens(seed)
    mask = tokens.completion_mask
    padded, padded_grad = with_gradient(objective, tokens)
    packed_tokens = type(tokens)(*(tensor[mask] for tensor in tokens))
    packed, packed_grad = with_gradient(objective, packed_tokens)
    single = [
        with_gradient(objective, type(tokens)(*(tensor[i] for tensor in packed_tokens)))
        for i in range(min(len(packed_tokens.advantages), 8))
    ]
    torch.testing.assert_close(packed_grad, padded_grad[mask], rtol=1e-6, atol=0.0)
    for i, (_, grad) in enumerate(single):
        torch.testing.assert_close(grad, packed_grad[i], rtol=1e-6, atol=0.0)
    for name in PER_TOKEN:
        if getattr(padded, name) is None:
            assert getattr(packed, name) is None
            continue
        whole = getattr(packed, name)
        torch.testing.assert_close(whole, getattr(padded, name)[mask], rtol=1e-6, atol=1e-9, equal_nan=True)
        for i, (output, _) in enumerate(single):
            torch.testing.assert_close(getattr(output, name), whole[i], rtol=1e-6, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 3, 4)])
def test_any_shape_is_kept(objective, make_tokens, shape):
    output, grad = with_gradient(objective, make_tokens(0, shape))
    assert grad.shape == shape
    assert {getattr(output, name).shape for name in PER_TOKEN if getattr(output, name) is not None} == {shape}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_results_are_float32_whatever_the_precision_of_the_inputs(objective, make_tokens, dtype):
    tokens = make_tokens(0)
    cast = tokens._replace(**{name: getattr(tokens, name).to(dtype) for name in tokens._fields[:3]})
    output, grad = with_gradient(objective, cast)
    expected = objective(*(tensor.float() for tensor in cast[:3]), tokens.completion_mask)
    assert_same_output(output, expected)
    assert {output.loss.dtype, output.grad_coefficient.dtype, output.grad_weight.dtype} == {torch.float32}
    assert grad.dtype == dtype


@check
@given(seed=SEEDS, scale=st.sampled_from([0.5, 2.0, 64.0]))
def test_weight_does_not_depend_on_the_scale_of_the_advantage(objective, make_tokens, seed, scale):
    tokens = make_tokens(seed)
    output = objective(*tokens)
    scaled = objective(*tokens._replace(advantages=scale * tokens.advantages))
    torch.testing.assert_close(scaled.grad_weight, output.grad_weight, rtol=1e-6, atol=1e-7, equal_nan=True)
    torch.testing.assert_close(scaled.loss, scale * output.loss, rtol=1e-5, atol=1e-7)


@check
@given(seed=SEEDS)
def test_a_token_that_moved_against_its_advantage_keeps_at_least_its_full_gradient(objective, make_tokens, seed):
    tokens = make_tokens(seed)
    output = objective(*tokens)
    log_ratio = exact_log_ratio(tokens)
    converging = tokens.completion_mask & (tokens.advantages * log_ratio < 0) & (log_ratio.abs() <= 20)
    assert (output.grad_weight[converging] >= 1 - 1e-5).all()
    diverging = tokens.completion_mask & (tokens.advantages * log_ratio > 0) & (log_ratio.abs() <= 20)
    assert (output.grad_weight[diverging] <= 1 + 1e-5).all()


@pytest.mark.usefixtures("unchecked_hints")
@pytest.mark.parametrize("name", ["rollout_logprobs", "advantages", "completion_mask"])
@pytest.mark.parametrize("shape", [[4], [4, 1], [1, 4], []])
def test_shapes_that_would_broadcast_raise(objective, make_tokens, name, shape):
    tokens = make_tokens(0, (4, 4))
    smaller = getattr(make_tokens(0, tuple(shape)), name)
    message = f"`{name}` must have the shape of `policy_logprobs` [4, 4], got {shape}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        objective(**tokens._replace(**{name: smaller})._asdict())


def test_describe_is_one_line_that_begins_with_the_name(objective):
    assert objective.describe().startswith(type(objective).__name__)
    assert "\n" not in objective.describe()


def test_settings_cannot_be_changed(objective):
    for field in dataclasses.fields(objective):
        with pytest.raises(dataclasses.FrozenInstanceError, match=field.name):
            setattr(objective, field.name, 1.0)


def test_the_built_in_objectives_need_no_optional_input(objective):
    assert objective.required_inputs == frozenset()
    assert objective.uses_importance_ratio
    objective.check_inputs(set())


@final
@dataclass(frozen=True)
class SequenceMean(Objective):
    """A sequence-level objective: the mean of log pi over the tokens of a sequence, times A."""

    required_inputs: ClassVar[frozenset[str]] = frozenset({"sequence_ids", "proximal_logprobs"})

    def terms(self, tokens):
        mean = torch.zeros_like(tokens.policy_logprobs)
        for sequence in tokens.sequence_ids.unique():
            own = (tokens.sequence_ids == sequence) & tokens.completion_mask
            mean = torch.where(own, tokens.policy_logprobs[own].mean(), mean)
        objective = mean * tokens.advantages + tokens.proximal_logprobs
        return TokenTerms(objective, tokens.advantages)

    def describe(self):
        return "SequenceMean"


@final
@dataclass(frozen=True)
class Unclamped(Objective):
    """Its formula protects it from nothing: no clamp, not 0 at A = 0, and a mean over all tokens."""

    required_inputs: ClassVar[frozenset[str]] = frozenset({"proximal_logprobs"})

    def terms(self, tokens):
        ratio = (tokens.policy_logprobs - tokens.rollout_logprobs).exp()
        proximal_ratio = (tokens.policy_logprobs - tokens.proximal_logprobs).exp()
        objective = ratio + proximal_ratio + tokens.policy_logprobs * tokens.advantages
        objective = objective + (ratio + proximal_ratio + tokens.advantages).mean()
        return TokenTerms(objective, ratio + proximal_ratio + tokens.advantages, ratio < 1.5)

    def describe(self):
        return "Unclamped"


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30, -1e30])
@pytest.mark.parametrize("field", ["policy_logprobs", "rollout_logprobs", "advantages", "proximal_logprobs"])
def test_inputs_are_masked_before_an_objective_sees_them(make_tokens, garbage, field):
    tokens = make_tokens(7)
    near = tokens.policy_logprobs.clamp(min=-5)
    tokens = tokens._replace(policy_logprobs=near, rollout_logprobs=near - 0.1)
    mask = tokens.completion_mask
    inputs = tokens._asdict() | {"proximal_logprobs": near - 0.2}
    results = []
    for values in (inputs, inputs | {field: torch.where(mask, inputs[field], garbage)}):
        policy = values["policy_logprobs"].clone().requires_grad_()
        output = Unclamped()(**(values | {"policy_logprobs": policy}))
        output.loss.sum().backward()
        results.append((output, policy.grad))
    (expected, expected_grad), (output, grad) = results
    assert_same_output(output, expected)
    assert torch.equal(grad, expected_grad)
    assert (grad[mask] != 0).all()
    for outside in (grad[~mask], output.loss[~mask], output.grad_coefficient[~mask]):
        assert (outside == 0).all()
    assert output.grad_weight[~mask].isnan().all()
    assert not output.keep[~mask].any()


@pytest.mark.parametrize("given_inputs", [(), ("sequence_ids",), ("proximal_logprobs",)])
def test_a_missing_required_input_raises(make_tokens, given_inputs):
    tokens = make_tokens(0)
    optional = {"sequence_ids": torch.zeros(6, 9, dtype=torch.long), "proximal_logprobs": torch.zeros(6, 9)}
    missing = sorted(set(optional) - set(given_inputs))
    message = "SequenceMean needs .*" + ".*".join(missing) + ".*, which the caller does not provide"
    with pytest.raises(ValueError, match=message):
        SequenceMean()(*tokens, **{name: optional[name] for name in given_inputs})
    with pytest.raises(ValueError, match=message):
        SequenceMean().check_inputs(set(given_inputs))


def test_required_inputs_reach_the_objective_masked_and_without_a_gradient(make_tokens):
    tokens = make_tokens(0)
    sequence_ids = torch.arange(6)[:, None].expand(6, 9)
    proximal = torch.where(tokens.completion_mask, -0.25, math.nan).requires_grad_()
    policy = tokens.policy_logprobs.clone().requires_grad_()
    output = SequenceMean()(policy, *tokens[1:], sequence_ids=sequence_ids, proximal_logprobs=proximal)
    output.loss.sum().backward()
    assert output.loss.isfinite().all()
    assert policy.grad.isfinite().all()
    assert proximal.grad is None
    for i in range(6):
        own = tokens.completion_mask[i]
        expected = -(tokens.policy_logprobs[i][own].mean() * tokens.advantages[i] - 0.25)
        torch.testing.assert_close(output.loss[i].detach(), torch.where(own, expected, 0.0))


def test_an_objective_without_formula_or_description_cannot_be_made():
    with pytest.raises(TypeError, match=r"abstract methods? .*describe.*terms"):
        Objective()


def test_an_objective_says_whether_it_has_a_mask(objective, make_tokens):
    assert (objective(*make_tokens(0)).keep is not None) == objective.has_mask
