"""Every scalar stands at the number of optimizer steps completed."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from drpo_lightning.datamodules import ArithmeticPrompts
from drpo_lightning.logs import log_metrics


class Everywhere(Callback):
    """Logs the steps completed, under the hook's name, in every hook that the package logs in."""

    def record(self, name, trainer, pl_module):
        log_metrics(trainer, pl_module, {name: torch.tensor(trainer.global_step)})

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.record("batch_start", trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.record("batch_end", trainer, pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        self.record("epoch_end", trainer, pl_module)

    def on_validation_epoch_end(self, trainer, pl_module):
        self.record("validation", trainer, pl_module)


def test_a_value_stands_at_the_steps_completed(make_run, monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(CSVLogger, "log_metrics", lambda self, metrics, step=None: written.append((metrics, step)))
    make_run(
        Everywhere(),
        trainer={"logger": CSVLogger(tmp_path), "max_epochs": 2, "num_sanity_val_steps": -1},
        data={"val_prompts": ArithmeticPrompts("validation", max_operand=9, num_validation=20)},
    ).fit()
    steps = {name: [step for metrics, step in written if name in metrics] for name in ("batch_start", "batch_end")}
    assert steps == {"batch_start": [0, 1, 2, 3], "batch_end": [1, 2, 3, 4]}
    for name in ("validation", "epoch_end"):
        steps[name] = [step for metrics, step in written if name in metrics]
    assert steps["validation"] == [0, 2, 4]
    assert steps["epoch_end"] == [2, 4]
    ours = [(metrics, step) for metrics, step in written if steps.keys() & metrics.keys()]
    assert all(metrics == {name: step} for metrics, step in ours for name in metrics)
    assert all(type(value) is float for metrics, _ in ours for value in metrics.values())


def test_other_callbacks_can_watch_a_value(make_run):
    run = make_run(Everywhere())
    run.fit()
    assert run.trainer.callback_metrics["batch_end"] == 2
    assert run.trainer.callback_metrics["epoch_end"] == 2


def test_what_is_no_number_is_refused(make_run):
    run = make_run()
    with pytest.raises(ValueError, match="could not convert"):
        log_metrics(run.trainer, run.module, {"name": "text"})
