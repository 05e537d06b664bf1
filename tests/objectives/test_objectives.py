"""What holds for every objective."""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import final

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drpo_lightning.functional import TopKLogprobs
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
    Objective,
    TokenTerms,
    TopKDPPO,
    Unregularized,
)

SEEDS = st.integers(0, 100_000)
PER_TOKEN = ("loss", "grad_coefficient", "grad_weight", "beyond_clamp", "keep")
RANGES = (st.floats(0.01, 0.9), st.floats(0.01, 5))
THRESHOLDS = st.one_of(st.none(), st.floats(0.01, 2))
COUPLED = st.one_of(
    st.builds(DRPO, st.floats(0.05, 20), st.booleans()),
    st.builds(MaskDRPO, st.floats(0.05, 20), st.floats(0.01, 1)),
    st.floats(0.05, 20).map(SPO),
    st.builds(DPPO, st.sampled_from(["binary_tv", "binary_kl"]), THRESHOLDS),
    st.builds(ClippedRatio, *RANGES),
    st.floats(1, 20).map(CISPO),
    st.builds(GSPO, *RANGES),
    st.builds(SAPO, st.floats(0.1, 5), st.floats(0.1, 5)),
    st.builds(DivergencePenalty, st.sampled_from(["kl", "k3", "tv"]), st.floats(0.01, 1), st.booleans()),
    st.just(Unregularized()),
)
SETTINGS = st.one_of(
    COUPLED,
    st.builds(TopKDPPO, st.just(4), st.sampled_from(["tv", "kl"]), THRESHOLDS),
    st.builds(Decoupled, COUPLED, st.one_of(st.none(), st.floats(1, 10))),
)

# Each of these names what does not hold for an objective, by its formula.
PENALTY_WITHOUT_ADVANTAGE = {"drpo_without_advantage", "penalty_kl", "penalty_k3", "penalty_tv"}
"""The penalty has a size of its own: it acts at A = 0 too, and w depends on the scale of A."""
PENALTY_AT_EQUALITY = {"penalty_kl", "penalty_kl_scaled"}
"""-log r has the slope -1 at pi = mu too: there the gradient is not A."""
OTHER_VALUE_AT_EQUALITY = {"cispo", "sapo"}
"""The objective is 0 and 2 A / tau at pi = mu: its gradient alone has a meaning."""
GATED_ON_BOTH_SIDES = {"cispo", "sapo"}
"""w falls with the distance from mu in either direction: a converging token loses weight too."""
PUSHED_UP = {"penalty_kl", "penalty_kl_scaled"}
"""w = 1 + b / (r A): above 1 for A > 0 and below for A < 0, whatever has moved where."""
WEIGHT_OF_THE_SEQUENCE = {"gspo", "decoupled_gspo"}
"""w is s / r: a token's depends on the others of its sequence."""
AROUND_THE_PROXIMAL_POLICY = {"decoupled_clipped_ratio", "decoupled_drpo"}
"""What converges and what diverges is told from pi_prox."""
TRUNCATED_FACTOR = {"decoupled_truncated"}
"""w has the factor C mu / pi_prox where pi_prox / mu is cut at C."""
CLOSED_AT_LARGE_RATIOS = {"sapo"}
"""4 p (1 - p) is less than the least float32 at r = e^20."""

check = settings(max_examples=25, deadline=None, derandomize=True)


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
    output, grad = tokens.under_with_gradient(objective)
    inside = tokens.completion_mask & (exact_log_ratio(tokens).abs() <= 20)
    scale = exact_log_ratio(tokens).clamp(-20, 20).exp() * tokens.advantages
    largest = torch.maximum(scale.abs(), output.grad_coefficient.abs())
    # Rounding of r - 1 near 0 is relative to A, or to 1 where a penalty is not scaled by |A|.
    unit = tokens.advantages.abs().clamp(min=1.0 if acts_without_advantage(objective) else 0.0)
    assert ((-grad - output.grad_coefficient).abs() <= 1e-4 * largest + 1e-6 * unit).all()
    assert (grad[~inside] == 0).all()
    assert (output.grad_coefficient[~inside] == 0).all()
    weighted = inside & (tokens.advantages != 0)
    from_coefficient = output.grad_coefficient.double() / scale
    torch.testing.assert_close(output.grad_weight[weighted].double(), from_coefficient[weighted], rtol=1e-4, atol=1e-4)


def acts_without_advantage(objective):
    return getattr(getattr(objective, "objective", objective), "scale_by_advantage", True) is False


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
    output, grad = tokens.under_with_gradient(objective)
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
def test_the_edge_of_the_clamp_is_at_twenty_nats(
    objective_name, objective, evaluate, policy, rollout, advantage, beyond
):
    # converging tokens, so that no objective masks them
    got = evaluate(objective, policy, rollout, advantage)
    assert got["beyond_clamp"] == beyond
    assert math.isfinite(got["loss"])
    without_gradient = beyond or (objective_name in CLOSED_AT_LARGE_RATIOS and policy > rollout)
    assert [got[name] == 0 for name in ("grad", "grad_coefficient", "grad_weight")] == [without_gradient] * 3


@check
@given(seed=SEEDS)
def test_weight_is_nan_exactly_where_the_advantage_is_zero_or_outside_the_completion(objective, make_tokens, seed):
    tokens = make_tokens(seed)
    output = tokens.under(objective)
    assert torch.equal(output.grad_weight.isnan(), ~tokens.completion_mask | (tokens.advantages == 0))
    assert not output.grad_coefficient.isnan().any()


@check
@given(seed=SEEDS)
def test_a_token_without_advantage_has_no_gradient(objective_name, objective, make_tokens, seed):
    tokens = make_tokens(seed)
    output, grad = tokens.under_with_gradient(objective)
    zero = tokens.completion_mask & (tokens.advantages == 0)
    moved = zero & (tokens.policy_logprobs != tokens.rollout_logprobs) & ~output.beyond_clamp
    if objective_name in PENALTY_WITHOUT_ADVANTAGE:
        assert (output.grad_coefficient[moved] != 0).all()
        return
    for values in (output.grad_coefficient, output.loss, grad):
        assert (values[zero] == 0).all()


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30, -1e30])
@pytest.mark.parametrize("field", ["policy_logprobs", "rollout_logprobs", "advantages", "proximal_logprobs", "all"])
def test_garbage_outside_the_completion_changes_nothing(objective, make_tokens, garbage, field):
    tokens = make_tokens(7)
    mask = tokens.completion_mask.clone()
    mask[0], mask[1] = False, True
    clean = tokens._replace(completion_mask=mask)

    def spoiled(tensor):
        inside = mask[..., None] if tensor.ndim > mask.ndim else mask
        if tensor.is_floating_point():
            return torch.where(inside, tensor, garbage)
        return torch.where(inside, tensor, ~tensor if tensor.dtype == torch.bool else tensor - 10**9)

    everywhere = clean.map(spoiled)._replace(completion_mask=mask)
    dirty = everywhere if field == "all" else clean._replace(**{field: getattr(everywhere, field)})
    expected, expected_grad = clean.under_with_gradient(objective)
    output, grad = dirty.under_with_gradient(objective)
    assert_same_output(output, expected)
    assert torch.equal(grad, expected_grad)
    for outside in (grad[~mask], output.loss[~mask], output.grad_coefficient[~mask]):
        assert (outside == 0).all()
    assert not output.beyond_clamp[~mask].any()
    assert output.keep is None or not output.keep[~mask].any()


def test_only_the_policy_gets_a_gradient(objective, make_tokens):
    tokens = make_tokens(3).map(lambda t: t.clone().requires_grad_() if t.is_floating_point() else t)
    output = tokens.under(objective)
    output.loss.sum().backward()
    policy, *others = (t for t in (*tokens[:-1], *tokens.topk) if t.is_floating_point())
    assert policy.grad.abs().sum() > 0
    assert len(others) == 5
    assert [leaf.grad for leaf in others] == [None] * 5
    assert output.loss.requires_grad
    assert not output.grad_coefficient.requires_grad
    assert not output.grad_weight.requires_grad


@check
@given(seed=SEEDS)
def test_on_policy_the_gradient_is_the_advantage(objective_name, objective, make_tokens, seed):
    tokens = make_tokens(seed)
    mu = tokens.rollout_logprobs
    same = tokens.topk._replace(policy_logprobs=tokens.topk.rollout_logprobs)
    tokens = tokens._replace(policy_logprobs=mu, proximal_logprobs=mu, topk=same)
    output, grad = tokens.under_with_gradient(objective)
    expected = torch.where(tokens.completion_mask, tokens.advantages, 0.0)
    if objective_name not in OTHER_VALUE_AT_EQUALITY:
        assert torch.equal(output.loss, -expected)
    assert output.keep is None or torch.equal(output.keep, tokens.completion_mask)
    if objective_name in PENALTY_AT_EQUALITY:
        return
    rounding = 1e-8 if objective_name in PENALTY_WITHOUT_ADVANTAGE else 0.0
    torch.testing.assert_close(-grad, expected, rtol=1e-6, atol=rounding)
    assert torch.equal(output.grad_coefficient, expected)
    assert output.grad_weight.nan_to_num(1.0).eq(1).all()


@check
@given(seed=SEEDS)
def test_padded_packed_and_parts_of_a_batch_give_the_same(objective_name, objective, make_tokens, seed):
    tokens = make_tokens(seed)
    mask = tokens.completion_mask
    padded, padded_grad = tokens.under_with_gradient(objective)
    packed_tokens = tokens.map(lambda tensor: tensor[mask])
    packed, packed_grad = packed_tokens.under_with_gradient(objective)
    torch.testing.assert_close(packed_grad, padded_grad[mask], rtol=1e-6, atol=0.0)
    assert_close_output(packed, select(padded, mask))
    if objective_name in WEIGHT_OF_THE_SEQUENCE:
        parts = [packed_tokens.sequence_ids == row for row in packed_tokens.sequence_ids.unique()]
    else:
        parts = list(range(min(len(packed_tokens.advantages), 8)))
    for part in parts:
        output, grad = packed_tokens.map(lambda tensor, part=part: tensor[part]).under_with_gradient(objective)
        torch.testing.assert_close(grad, packed_grad[part], rtol=1e-6, atol=0.0)
        assert_close_output(output, select(packed, part))


def select(output, index):
    return type(output)(*(None if values is None else values[index] for values in output))


def assert_close_output(got, expected):
    for name in PER_TOKEN:
        a, b = getattr(got, name), getattr(expected, name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 3, 4)])
def test_any_shape_is_kept(objective, make_tokens, shape):
    output, grad = make_tokens(0, shape).under_with_gradient(objective)
    assert grad.shape == shape
    assert {getattr(output, name).shape for name in PER_TOKEN if getattr(output, name) is not None} == {shape}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_results_are_float32_whatever_the_precision_of_the_inputs(objective, make_tokens, dtype):
    cast = make_tokens(0).map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
    output, grad = cast.under_with_gradient(objective)
    expected = cast.map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor).under(objective)
    assert_same_output(output, expected)
    assert {output.loss.dtype, output.grad_coefficient.dtype, output.grad_weight.dtype} == {torch.float32}
    assert grad.dtype == dtype


@check
@given(seed=SEEDS, scale=st.sampled_from([0.5, 2.0, 64.0]))
def test_weight_does_not_depend_on_the_scale_of_the_advantage(objective_name, objective, make_tokens, seed, scale):
    tokens = make_tokens(seed)
    output = tokens.under(objective)
    scaled = tokens._replace(advantages=scale * tokens.advantages).under(objective)
    if objective_name in PENALTY_WITHOUT_ADVANTAGE:
        acted = output.grad_weight.isfinite() & ((output.grad_weight - 1).abs() > 1e-3) & ~output.beyond_clamp
        expected = 1 + (output.grad_weight[acted] - 1) / scale
        torch.testing.assert_close(scaled.grad_weight[acted], expected, rtol=1e-4, atol=1e-4)
        return
    torch.testing.assert_close(scaled.grad_weight, output.grad_weight, rtol=1e-6, atol=1e-7, equal_nan=True)
    torch.testing.assert_close(scaled.loss, scale * output.loss, rtol=1e-5, atol=1e-7)


@check
@given(seed=SEEDS)
def test_a_token_that_moved_against_its_advantage_keeps_at_least_its_full_gradient(
    objective_name, objective, make_tokens, seed
):
    tokens = make_tokens(seed)
    output = tokens.under(objective)
    log_ratio = exact_log_ratio(tokens)
    inside = tokens.completion_mask & (log_ratio.abs() <= 20)
    if objective_name in AROUND_THE_PROXIMAL_POLICY:
        factor = tokens.proximal_logprobs - tokens.rollout_logprobs
        log_ratio = (tokens.policy_logprobs - tokens.proximal_logprobs).double()
        inside &= (log_ratio.abs() <= 20) & (factor.abs() <= 20)
    converging, diverging = inside & (tokens.advantages * log_ratio < 0), inside & (tokens.advantages * log_ratio > 0)
    if objective_name not in GATED_ON_BOTH_SIDES | PUSHED_UP | WEIGHT_OF_THE_SEQUENCE | TRUNCATED_FACTOR:
        assert (output.grad_weight[converging] >= 1 - 1e-5).all()
        assert (output.grad_weight[diverging] <= 1 + 1e-5).all()
    if objective_name in GATED_ON_BOTH_SIDES:
        assert (output.grad_weight[inside & (tokens.advantages != 0)] <= 1 + 1e-5).all()
    if objective_name in PUSHED_UP:
        weighted = inside & (tokens.advantages != 0)
        assert ((output.grad_weight[weighted] - 1) * tokens.advantages[weighted] >= -1e-5).all()


@pytest.mark.usefixtures("unchecked_hints")
@pytest.mark.parametrize(
    "name", ["rollout_logprobs", "advantages", "completion_mask", "sequence_ids", "proximal_logprobs"]
)
@pytest.mark.parametrize("shape", [[4], [4, 1], [1, 4], []])
def test_shapes_that_would_broadcast_raise(make_tokens, name, shape):
    tokens = make_tokens(0, (4, 4))
    smaller = getattr(make_tokens(0, tuple(shape)), name)
    message = f"`{name}` must have the shape of `policy_logprobs` [4, 4], got {shape}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tokens._replace(**{name: smaller}).under(Unregularized())


def test_describe_is_one_line_that_begins_with_the_name(objective):
    assert objective.describe().startswith(type(objective).__name__)
    assert "\n" not in objective.describe()


def test_settings_cannot_be_changed(objective):
    for field in dataclasses.fields(objective):
        with pytest.raises(dataclasses.FrozenInstanceError, match=field.name):
            setattr(objective, field.name, 1.0)


REQUIRED_INPUTS = {
    "topk_dppo_tv": {"topk"},
    "topk_dppo_kl": {"topk"},
    "gspo": {"sequence_ids"},
    "decoupled_clipped_ratio": {"proximal_logprobs"},
    "decoupled_drpo": {"proximal_logprobs"},
    "decoupled_gspo": {"proximal_logprobs", "sequence_ids"},
    "decoupled_truncated": {"proximal_logprobs"},
}


def test_an_objective_names_the_optional_inputs_that_it_needs(objective_name, objective, make_tokens):
    required = REQUIRED_INPUTS.get(objective_name, set())
    assert objective.required_inputs == required
    assert objective.uses_importance_ratio
    assert objective.num_topk == (4 if "topk" in required else 0)
    tokens = make_tokens(0)
    output = objective(*tokens[:4], **{name: getattr(tokens, name) for name in required})
    assert_same_output(output, tokens.under(objective))
    for name in required:
        with pytest.raises(ValueError, match=rf"{type(objective).__name__} needs \['{name}'\], which the caller"):
            tokens._replace(**{name: None}).under(objective)


@final
@dataclass(frozen=True)
class SequenceMean(Objective):
    """A sequence-level objective: the mean of log pi over the tokens of a sequence, times A."""

    @property
    def required_inputs(self):
        return frozenset({"sequence_ids", "proximal_logprobs"})

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

    @property
    def required_inputs(self):
        return frozenset({"proximal_logprobs"})

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
        SequenceMean()(*tokens[:4], **{name: optional[name] for name in given_inputs})
    with pytest.raises(ValueError, match=message):
        SequenceMean().check_inputs(set(given_inputs))


def test_required_inputs_reach_the_objective_masked_and_without_a_gradient(make_tokens):
    tokens = make_tokens(0)
    sequence_ids = torch.arange(6)[:, None].expand(6, 9)
    proximal = torch.where(tokens.completion_mask, -0.25, math.nan).requires_grad_()
    policy = tokens.policy_logprobs.clone().requires_grad_()
    output = SequenceMean()(policy, *tokens[1:4], sequence_ids=sequence_ids, proximal_logprobs=proximal)
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
    assert (make_tokens(0).under(objective).keep is not None) == objective.has_mask


class TopKShift(Objective):
    """The shift of the most likely token, which nothing of its formula masks."""

    def terms(self, tokens):
        shift = (tokens.topk.policy_logprobs.exp() - tokens.topk.rollout_logprobs.exp()).sum(-1)
        objective = tokens.policy_logprobs * (shift.sum() + tokens.topk.holds_sampled.sum())
        return TokenTerms(objective, shift)

    def describe(self):
        return "TopKShift"


def test_the_top_k_are_masked_before_an_objective_sees_them(make_tokens):
    tokens = make_tokens(7)
    mask = tokens.completion_mask
    garbage = TopKLogprobs(
        *(torch.where(mask[..., None], values, math.nan) for values in tokens.topk[:2]),
        tokens.topk.holds_sampled ^ ~mask,
    )
    expected, output = (tokens._replace(topk=topk).under(TopKShift()) for topk in (tokens.topk, garbage))
    assert_same_output(output, expected)
    assert output.loss.isfinite().all()


def test_topk_logprobs_outside_the_completion_are_nothing_and_without_a_gradient(make_tokens):
    tokens = make_tokens(0)
    topk = TopKLogprobs(*(t.clone().requires_grad_() for t in tokens.topk[:2]), tokens.topk.holds_sampled)
    masked = topk.masked(tokens.completion_mask)
    assert masked.policy_logprobs[~tokens.completion_mask].isneginf().all()
    assert masked.rollout_logprobs[~tokens.completion_mask].isneginf().all()
    assert torch.equal(masked.policy_logprobs[tokens.completion_mask], topk.policy_logprobs[tokens.completion_mask])
    assert torch.equal(masked.holds_sampled, topk.holds_sampled & tokens.completion_mask)
    assert not masked.policy_logprobs.requires_grad
