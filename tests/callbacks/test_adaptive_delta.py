"""Delta follows the tokens: measured right, moved in the right direction, within bounds, and kept over a resume."""

import math

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

from drpo_lightning.callbacks.adaptive_delta import AdaptiveDelta
from drpo_lightning.errors import SettingError
from drpo_lightning.objectives import DPPO, DRPO

NAMES = {"quantile": "adaptive/abs_shift_p99", "corrective_fraction": "adaptive/corrective_fraction"}


class DeltaRecorder(Callback):
    """Keeps the delta that every micro-batch is trained with."""

    def __init__(self):
        self.deltas = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.deltas.append(pl_module.objective.delta)


def settings(delta, lr=0.3, **trainer):
    """A run whose policy moves far within a rollout."""
    return {
        "module": {"objective": DRPO(delta), "optimizer": lambda p: torch.optim.SGD(p, lr=lr)},
        "data": {"num_updates": 4},
        "trainer": {"max_epochs": 3, "gradient_clip_val": 1.0, **trainer},
    }


def float64_tokens(pairs):
    """pi - mu and A of all completion tokens of some micro-batches and their outputs."""
    columns = [
        (output["policy_logprobs"], batch.rollout_logprobs, batch.advantages, batch.completion_mask)
        for batch, output in pairs
    ]
    log_pi, log_mu, advantages = (
        np.concatenate([column[i][column[3]].double().numpy() for column in columns]) for i in range(3)
    )
    return np.exp(log_pi) - np.exp(log_mu), advantages


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("statistic", NAMES)
def test_the_statistic_equals_a_float64_computation(make_run, make_memory, make_recorder, statistic, accumulate):
    logger, recorder, deltas = make_memory(), make_recorder(), DeltaRecorder()
    parts = settings(0.3, logger=logger, accumulate_grad_batches=accumulate)
    # The median: of so few tokens, the 99 % quantile is the largest, with or without what is not a completion.
    make_run(AdaptiveDelta(statistic, quantile=0.5), recorder, deltas, **parts).fit()
    batches = [batch for epoch in recorder.batches for batch in epoch]
    pairs = list(zip(batches, recorder.outputs, strict=True))
    measured = logger.values(NAMES[statistic].replace("p99", "p50"))
    assert len(measured) == 12
    for i, value in enumerate(measured):
        shift, advantages = float64_tokens(pairs[accumulate * i : accumulate * (i + 1)])
        if statistic == "quantile":
            expected = np.quantile(abs(shift), 0.5, method="inverted_cdf")
            assert value == pytest.approx(expected, rel=0.024, abs=1e-6)
        else:
            weight = 1 - np.sign(advantages) * shift / deltas.deltas[accumulate * i]
            assert value == pytest.approx((weight[advantages != 0] < 0).mean())
    assert max(measured) > 0.01


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("statistic", "sign"), [("quantile", -1), ("corrective_fraction", 1)])
def test_delta_follows_the_formula_after_every_update_but_the_first_of_a_rollout(
    make_run, make_memory, statistic, sign, accumulate
):
    logger, recorder = make_memory(), DeltaRecorder()
    parts = settings(0.3, logger=logger, accumulate_grad_batches=accumulate)
    make_run(AdaptiveDelta(statistic, gain=0.3), recorder, **parts).fit()
    target = {"quantile": 0.2, "corrective_fraction": 0.01}[statistic]
    expected = [0.3]
    for i, measured in enumerate(logger.values(NAMES[statistic])):
        error = np.clip(math.log(max(measured, 1e-300) / target), -1, 1)
        moved = expected[-1] * math.exp(sign * 0.3 * error)
        expected.append(expected[-1] if i % 4 == 0 else min(max(moved, 0.05), 12.5))
    assert len(set(expected)) > 4
    assert logger.values("adaptive/delta") == pytest.approx(expected[:-1], rel=1e-9)
    assert recorder.deltas == pytest.approx(np.repeat(expected[:-1], accumulate).tolist(), rel=1e-9)
    assert logger.steps("adaptive/delta") == list(range(1, 13))


def crowded(delta, optimizer, **trainer):
    """A run of 8 updates per rollout on few prompts: what an update does shows in the tokens of the next."""
    return {
        "module": {"objective": DRPO(delta), "optimizer": optimizer},
        "data": {"num_prompts": 8, "group_size": 32, "num_updates": 8},
        "trainer": {"gradient_clip_val": 1.0, **trainer},
    }


def off_policy(values, num_updates=8):
    """Without the first update of each rollout."""
    return np.array([value for i, value in enumerate(values) if i % num_updates])


def fixed(statistic):
    """Measures and moves delta by nothing."""
    return AdaptiveDelta(statistic, gain=1e-12, min_delta=0.01)


@pytest.mark.parametrize(("statistic", "sign"), [("quantile", 1), ("corrective_fraction", -1)])
def test_a_larger_delta_means_a_larger_shift_and_fewer_corrective_tokens(make_run, make_memory, statistic, sign):
    """What the two directions rest on."""
    means = []
    for delta in (0.1, 5.0):
        logger = make_memory()
        parts = crowded(delta, lambda p: torch.optim.SGD(p, lr=0.02), logger=logger, max_epochs=3)
        make_run(fixed(statistic), **parts).fit()
        means.append(off_policy(logger.values(NAMES[statistic])).mean())
    assert sign * (means[1] - means[0]) > 0.005


@pytest.mark.parametrize("delta", [0.06, 5.0])
@pytest.mark.parametrize(
    ("statistic", "target", "tolerance"), [("quantile", 0.2, 1.4), ("corrective_fraction", 0.02, 1.4)]
)
def test_the_statistic_settles_at_its_target_from_both_sides(
    make_run, make_memory, statistic, target, tolerance, delta
):
    logger = make_memory()
    callback = AdaptiveDelta(statistic, target=target, gain=0.3)
    parts = crowded(delta, lambda p: torch.optim.SGD(p, lr=0.02), logger=logger, max_epochs=8)
    make_run(callback, **parts).fit()
    errors = np.log(np.maximum(off_policy(logger.values(NAMES[statistic]))[14:], 1e-9) / target).clip(-1, 1)
    assert np.exp(abs(errors.mean())) < tolerance


def test_without_the_callback_it_would_be_elsewhere(make_run, make_memory):
    logger = make_memory()
    parts = crowded(5.0, lambda p: torch.optim.SGD(p, lr=0.02), logger=logger, max_epochs=4)
    make_run(fixed("quantile"), **parts).fit()
    assert np.exp(np.log(off_policy(logger.values("adaptive/abs_shift_p99"))).mean()) > 1.4 * 0.2


@pytest.mark.parametrize(("target", "bound"), [(1e-6, 0.04), (0.999, 0.06)])
def test_delta_stays_within_its_bounds(make_run, target, bound):
    recorder = DeltaRecorder()
    callback = AdaptiveDelta(target=target, gain=0.5, min_delta=0.04, max_delta=0.06)
    make_run(callback, recorder, **settings(0.05)).fit()
    assert recorder.deltas[-1] == bound
    assert all(0.04 <= delta <= 0.06 for delta in recorder.deltas)


@pytest.mark.parametrize("step", [3, 4, 6])
def test_a_resumed_run_goes_on_with_the_same_delta(make_run, make_recorder, tmp_path, step):
    def save(trainer, pl_module, batch_idx):
        if trainer.global_step == step:
            trainer.save_checkpoint(tmp_path / "run.ckpt")

    deltas = []
    for recorder, ckpt_path in ((make_recorder(save), None), (make_recorder(), tmp_path / "run.ckpt")):
        used = DeltaRecorder()
        make_run(AdaptiveDelta(gain=0.3), recorder, used, **settings(0.3)).fit(ckpt_path=ckpt_path)
        deltas.append(used.deltas)
    assert len(set(deltas[0])) > 5
    assert deltas[1] == deltas[0][step:]


def test_it_logs_as_often_as_asked_and_moves_delta_after_every_update(make_run, make_memory):
    logger, often = DeltaRecorder(), DeltaRecorder()
    memory = make_memory()
    make_run(AdaptiveDelta(), logger, **settings(0.3, logger=memory, log_every_n_steps=3)).fit()
    make_run(AdaptiveDelta(), often, **settings(0.3)).fit()
    assert logger.deltas == often.deltas
    assert memory.steps("adaptive/delta") == [3, 6, 9, 12]
    assert memory.values("adaptive/delta") == often.deltas[2::3]


def test_an_update_without_completion_tokens_leaves_delta_alone(make_run):
    class NoTokens(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batch.completion_mask.zero_()

    recorder = DeltaRecorder()
    make_run(NoTokens(), AdaptiveDelta(), recorder, **settings(0.3)).fit()
    assert set(recorder.deltas) == {0.3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"module": {"objective": DPPO()}}, r"DPPO has only \['divergence', 'threshold'\]; take an objective with a"),
        ({"module": {"objective": DRPO(50.0)}}, "`max_delta` 12.5, got 50"),
        ({"data": {"num_updates": 1}}, "`AdaptiveDelta` needs `data.num_updates` of at least 2, got 1"),
    ],
)
def test_a_run_that_cannot_work_is_refused_at_the_start(make_run, make_recorder, change, message):
    recorder = make_recorder()
    with pytest.raises(SettingError, match=message):
        make_run(AdaptiveDelta(), recorder, **change).fit()
    assert not recorder.events


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"statistic": "mean"}, "`statistic` must be one of"),
        ({"target": 0.0}, "`target` must be in"),
        ({"quantile": 1.0}, "`quantile` must be in"),
        ({"gain": 0.0}, "`gain` must be positive, got 0.0"),
        ({"min_delta": 2.0, "max_delta": 1.0}, "`min_delta` must be positive and less than `max_delta` 1.0, got 2.0"),
        ({"min_delta": 0.0}, "`min_delta` must be positive"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveDelta(**arguments)
