"""What is logged of the reference: equal to a float64 computation, however the update is split, and 0 at the start."""

import itertools

import pytest
import torch

from drpo_lightning.callbacks import MismatchAndDrift, PolicyShift, ReferenceDivergence
from drpo_lightning.callbacks.update_statistics import CompletionTokens
from drpo_lightning.errors import SettingError
from drpo_lightning.modules import ReferencePenalty

KEYS = {
    "reference/k1_kl",
    "reference/k3_kl",
    "reference/log_ratio_abs_mean",
    "reference/log_ratio_abs_max",
    "reference/beyond_clamp_fraction",
}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def logged(make_run, make_memory, *callbacks, reference, **trainer):
    logger = make_memory()
    make_run(
        ReferenceDivergence(),
        *callbacks,
        trainer={"logger": logger} | trainer,
        module={"reference": reference, "optimizer": sgd},
    ).fit()
    return logger


def test_a_rollout_is_compared_with_the_reference_as_a_float64_computation_says(make_run, make_memory, make_recorder):
    recorder = make_recorder()
    logger = logged(
        make_run,
        make_memory,
        recorder,
        reference=ReferencePenalty(0.0),
        max_epochs=2,
        accumulate_grad_batches=2,
    )
    batches = list(itertools.chain.from_iterable(recorder.batches))
    for update in range(4):
        window = slice(2 * update, 2 * update + 2)
        pi, mu, ref = (
            torch.cat([values[batch.completion_mask].double() for batch, values in pairs])
            for pairs in (
                [(b, o["policy_logprobs"]) for b, o in zip(batches[window], recorder.outputs[window], strict=True)],
                [(b, b.rollout_logprobs) for b in batches[window]],
                [(b, b.reference_logprobs) for b in batches[window]],
            )
        )
        ratio, log_ratio = (pi - mu).exp(), pi - ref
        expected = {
            "reference/k1_kl": (ratio * log_ratio).mean(),
            "reference/k3_kl": (ratio * (torch.expm1(-log_ratio) + log_ratio)).mean(),
            "reference/log_ratio_abs_mean": log_ratio.abs().mean(),
            "reference/log_ratio_abs_max": log_ratio.abs().max(),
            "reference/beyond_clamp_fraction": 0.0,
        }
        for name, value in expected.items():
            assert logger.values(name)[update] == pytest.approx(float(value), rel=1e-3, abs=1e-6), name
    assert logger.steps("reference/k3_kl") == [1, 2, 3, 4]


def test_in_the_first_update_of_a_run_the_divergence_is_zero_and_then_grows(make_run, make_memory):
    logger = logged(make_run, make_memory, reference=ReferencePenalty(0.0), max_epochs=2)
    first, *later = logger.values("reference/k3_kl")
    assert abs(first) < 1e-8
    assert logger.values("reference/log_ratio_abs_max")[0] < 1e-4
    assert min(later) > 1e-5
    assert {name for name in logger.scalars if name.startswith("reference/")} == KEYS


def test_what_is_logged_does_not_depend_on_the_micro_batches(make_run, make_memory):
    loggers = [
        logged(make_run, make_memory, reference=ReferencePenalty(1.0), accumulate_grad_batches=accumulate)
        for accumulate in (1, 4)
    ]
    for name in (*KEYS, "optim/reference_penalty", "optim/loss"):
        assert loggers[0].values(name) == pytest.approx(loggers[1].values(name), rel=1e-3, abs=1e-5), name


def test_the_other_statistics_do_not_depend_on_the_reference(make_run, make_memory):
    values = []
    for reference, callbacks in ((None, ()), (ReferencePenalty(0.0), (ReferenceDivergence(),))):
        logger = make_memory()
        make_run(PolicyShift(), *callbacks, trainer={"logger": logger}, module={"reference": reference}).fit()
        values.append(logger.values("policy_shift/abs_mean"))
    assert values[0] == values[1]


def test_drift_is_measured_on_a_part_of_a_rollout_with_a_reference_too(make_run, make_memory):
    drift = []
    for reference in (None, ReferencePenalty(0.0)):
        logger = make_memory()
        make_run(MismatchAndDrift(num_sequences=3), trainer={"logger": logger}, module={"reference": reference}).fit()
        drift.append(logger.values("drift/k3_kl"))
    assert drift[0] == drift[1] != []


def test_tokens_without_a_gradient_are_counted():
    logprobs = {"policy_logprobs": [-21.0, -30.0, -1.0, -0.5], "reference_logprobs": [-1.0, -1.0, -40.0, -0.5]}
    tokens = CompletionTokens(
        token_ids=torch.arange(4),
        rollout_logprobs=torch.tensor(logprobs["policy_logprobs"]),
        advantages=torch.ones(4),
        grad_weight=torch.ones(4),
        beyond_clamp=torch.zeros(4, dtype=torch.bool),
        keep=None,
        proximal_logprobs=None,
        **{name: torch.tensor(values) for name, values in logprobs.items()},
    )
    values = ReferenceDivergence().token_values(tokens).values
    assert values["reference/beyond_clamp_fraction"].tolist() == [0, 1, 0, 0]


def test_without_a_reference_it_says_what_to_set(make_run):
    with pytest.raises(SettingError, match=r"set `model.reference`, with a beta of 0 to measure"):
        make_run(ReferenceDivergence()).fit()
