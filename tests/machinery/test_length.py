"""How long Lightning lets a run be, when it validates, and how it goes on."""

from datetime import timedelta

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
    Timer,
)

from tests.machinery.conftest import VALIDATION, flat, sgd


@pytest.mark.parametrize(("num_batches", "steps"), [(True, 1), (5, 2)])
def test_fast_dev_run_takes_a_few_micro_batches_of_one_rollout_and_validates(fit, num_batches, steps):
    run, watcher = fit(trainer={"fast_dev_run": num_batches, "max_epochs": 7})
    assert (run.trainer.global_step, len(watcher.rollouts), watcher.validations) == (steps, 1, [steps])


@pytest.mark.parametrize(
    ("settings", "steps", "num_rollouts", "validations"),
    [
        ({"limit_train_batches": 1}, 3, 3, [0, 1, 2, 3]),
        ({"limit_train_batches": 0.5}, 3, 3, [0, 1, 2, 3]),
        ({"limit_train_batches": 0}, 0, 0, [0]),
        ({"limit_val_batches": 0}, 6, 3, []),
        ({"limit_val_batches": 1}, 6, 3, [0, 2, 4, 6]),
        ({"max_steps": 3, "max_epochs": -1}, 3, 2, [0, 2]),
        ({"max_steps": 3}, 3, 2, [0, 2]),
        ({"min_steps": 3, "max_epochs": 1}, 2, 1, [0, 2]),
        ({"num_sanity_val_steps": 0}, 6, 3, [2, 4, 6]),
        ({"num_sanity_val_steps": -1}, 6, 3, [0, 2, 4, 6]),
        ({"check_val_every_n_epoch": 2}, 6, 3, [0, 4]),
        ({"val_check_interval": 1}, 6, 3, [0, 1, 2, 3, 4, 5, 6]),
        ({"val_check_interval": 0.5}, 6, 3, [0, 1, 2, 3, 4, 5, 6]),
        ({"val_check_interval": 2, "accumulate_grad_batches": 2}, 6, 3, [0, 1, 2, 3, 4, 5, 6]),
        ({"val_check_interval": 4, "check_val_every_n_epoch": None}, 6, 3, [0, 4]),
        ({"accumulate_grad_batches": 4}, 6, 3, [0, 2, 4, 6]),
    ],
    ids=str,
)
def test_updates_rollouts_and_validations_come_when_they_should(fit, settings, steps, num_rollouts, validations):
    run, watcher = fit(trainer={"max_epochs": 3} | settings)
    assert (run.trainer.global_step, len(watcher.rollouts)) == (steps, num_rollouts)
    assert watcher.validations == validations


@pytest.mark.parametrize(
    ("callbacks", "settings", "steps"),
    [
        ([], {"max_time": timedelta(seconds=3)}, 3),
        ([Timer(timedelta(seconds=3))], {}, 3),
        ([Timer(timedelta(seconds=3), interval="epoch")], {}, 4),
    ],
    ids=["max_time", "step", "epoch"],
)
def test_the_time_is_up_after_an_update_or_after_a_rollout(fit, monkeypatch, callbacks, settings, steps):
    """With updates of a second each."""
    seconds = []

    class Clock(Callback):
        def on_train_batch_end(self, *_):
            seconds.append(1)

    monkeypatch.setattr(Timer, "time_elapsed", lambda self, stage=None: sum(seconds))
    run, watcher = fit(Clock(), *callbacks, trainer={"max_epochs": -1} | settings)
    assert (run.trainer.global_step, len(watcher.rollouts), watcher.validations) == (steps, 2, [0, 2, steps])


@pytest.mark.parametrize(("num_batches", "steps"), [(1, 3), (1.0, 6)])
def test_overfitting_samples_the_same_prompts_anew(fit, num_batches, steps):
    run, watcher = fit(trainer={"overfit_batches": num_batches, "max_epochs": 3})
    assert run.trainer.global_step == steps
    first, *others = watcher.rollouts
    for rollout in others:
        assert rollout.prompt_ids == first.prompt_ids
        assert rollout.completions != first.completions


def test_a_trainer_validates_what_it_has_fitted(fit):
    run, watcher = fit(trainer={"max_epochs": 2})
    (metrics,) = run.trainer.validate(run.module, run.data, verbose=False)
    assert metrics["val/reward/mean"] == pytest.approx(float(run.trainer.callback_metrics["val/reward/mean"]))
    assert watcher.validations == [0, 2, 4, 4]
    assert {"val/reward/mean", "val/pass@1", "val/completions/mean_length"} <= metrics.keys()


def test_what_was_validated_can_be_fitted(make_run, fit):
    fitted, _ = fit()
    run = make_run(data=VALIDATION)
    before = run.trainer.validate(run.module, run.data, verbose=False)
    run.fit()
    for name, value in fitted.trainer.callback_metrics.items():
        if not name.startswith("perf/"):
            assert run.trainer.callback_metrics[name] == value, name
    assert before[0]["val/reward/mean"] != run.trainer.callback_metrics["val/reward/mean"]


def test_a_second_fit_goes_on(fit):
    whole, _ = fit(trainer={"max_epochs": 4}, module={"optimizer": sgd})
    run, watcher = fit(trainer={"max_epochs": 2}, module={"optimizer": sgd})
    run.fit()
    assert (run.trainer.global_step, len(watcher.rollouts)) == (4, 2), "all epochs are done"
    run.trainer.fit_loop.max_epochs = 4
    run.fit()
    assert run.trainer.global_step == 8
    assert torch.equal(flat(run.module), flat(whole.module))


@pytest.mark.parametrize("name", ["test", "predict"])
def test_there_is_no_test_and_no_prediction(make_run, name):
    run = make_run(data=VALIDATION)
    with pytest.raises(MisconfigurationException, match=rf"`{name}_(step|dataloader)"):
        getattr(run.trainer, name)(run.module, run.data)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"every_n_train_steps": 3}, "epoch=1-step=3.ckpt"),
        ({"every_n_train_steps": 4}, "epoch=1-step=4.ckpt"),
        ({}, "epoch=1-step=4.ckpt"),
    ],
    ids=["mid-rollout", "last update", "end of a rollout"],
)
def test_a_run_with_max_steps_resumes(fit, tmp_path, settings, name):
    def checkpoint(folder):
        return ModelCheckpoint(tmp_path / folder, save_top_k=-1, **settings)

    trainer = {"max_steps": 7, "max_epochs": -1, "enable_checkpointing": True}
    whole, _ = fit(checkpoint("whole"), trainer=trainer)
    resumed, _ = fit(checkpoint("resumed"), trainer=trainer, ckpt_path=tmp_path / "whole" / name)
    assert resumed.trainer.global_step == whole.trainer.global_step == 7
    assert torch.equal(flat(resumed.module), flat(whole.module))
