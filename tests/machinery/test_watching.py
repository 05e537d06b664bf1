"""What checkpoints, early stopping, loggers and profilers get to see."""

import pytest
import torch
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from drpo_lightning.callbacks import PolicyShift, RolloutStatistics
from tests.machinery.conftest import scalars_of_csv


def halving(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)


def test_a_checkpoint_is_kept_where_the_metric_is_best(fit, tmp_path):
    """Every metric is known when a checkpoint is written, whether after an update or at the end of an epoch."""
    names = ["val/reward/mean", "reward/mean", "policy_shift/abs_mean", "optim/loss"]
    every = {"epoch": {}, "step": {"every_n_train_steps": 1}}
    checkpoints = {
        (name, kind, mode): ModelCheckpoint(
            tmp_path / f"{i}-{kind}-{mode}", "{step}", monitor=name, mode=mode, save_top_k=-1, **settings
        )
        for i, name in enumerate(names)
        for kind, settings in every.items()
        for mode in ("min", "max")
        if (i, kind) not in ((0, "step"), (3, "step"))  # known later than the update itself
    }
    logger = CSVLogger(tmp_path / "csv")
    _, watcher = fit(
        *checkpoints.values(),
        RolloutStatistics(),
        PolicyShift(),
        trainer={"max_epochs": 3, "enable_checkpointing": True, "logger": logger},
    )
    scalars = {name: dict(values) for name, values in scalars_of_csv(logger.log_dir).items()}
    for (name, kind, mode), checkpoint in checkpoints.items():
        steps = [2, 4, 6] if kind == "epoch" else [1, 2, 3, 4, 5, 6]
        saved = {
            step: float(checkpoint.best_k_models[str(checkpoint.dirpath) + f"/step={step}.ckpt"]) for step in steps
        }
        newest = {
            step: max(s for s in scalars[name] if s <= (step - 1 if name == "reward/mean" else step)) for step in steps
        }
        assert saved == pytest.approx({step: scalars[name][newest[step]] for step in steps}, rel=1e-5), (name, kind)
        best = {"min": min, "max": max}[mode](saved, key=saved.get)
        assert checkpoint.best_model_path.endswith(f"step={best}.ckpt")
        state = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
        weights = torch.cat([state[key].flatten() for key in state if "lm_head" not in key])
        assert torch.equal(weights, watcher.weights[best])


@pytest.mark.parametrize(
    ("settings", "monitor", "data", "steps"),
    [
        ({}, "val/reward/mean", {}, 4),
        ({}, "reward/mean", {}, 4),
        ({}, "policy_shift/abs_mean", {"val_prompts": None}, 4),
        ({"check_val_every_n_epoch": 2}, "val/reward/mean", {}, 8),
        ({"val_check_interval": 2}, "val/reward/mean", {"num_updates": 8}, 4),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, "val/reward/mean", {}, 6),
    ],
    ids=str,
)
def test_early_stopping_stops_at_the_second_look_without_an_improvement(fit, settings, monitor, data, steps):
    stopping = EarlyStopping(monitor, mode="max", min_delta=10.0, patience=1)
    run, _ = fit(RolloutStatistics(), PolicyShift(), stopping, trainer={"max_epochs": 9} | settings, data=data)
    assert (run.trainer.global_step, stopping.wait_count) == (steps, 1)


def test_a_metric_that_is_logged_less_often_than_it_is_watched_is_missed(fit):
    with pytest.raises(RuntimeError, match="Early stopping conditioned on metric `policy_shift/abs_mean` which is not"):
        fit(PolicyShift(), EarlyStopping("policy_shift/abs_mean"), trainer={"log_every_n_steps": 3})


@pytest.mark.parametrize(
    ("log_every_n_steps", "steps"), [(1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (0, [])], ids=["1", "2", "never"]
)
def test_every_logger_gets_the_same_scalars_at_the_same_steps(fit, tmp_path, log_every_n_steps, steps):
    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path, name="tensorboard", default_hp_metric=False)]
    fit(
        RolloutStatistics(),
        PolicyShift(),
        LearningRateMonitor("step"),
        DeviceStatsMonitor(cpu_stats=True),
        trainer={"max_epochs": 3, "logger": loggers, "log_every_n_steps": log_every_n_steps},
        module={"lr_scheduler": halving},
    )
    in_csv, events = scalars_of_csv(loggers[0].log_dir), EventAccumulator(loggers[1].log_dir).Reload()
    in_tensorboard = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    in_tensorboard.pop("epoch", None)
    assert in_csv.keys() == in_tensorboard.keys()
    for name, values in in_csv.items():
        assert [step for step, _ in values] == [step for step, _ in in_tensorboard[name]], name
        assert [v for _, v in values] == pytest.approx([v for _, v in in_tensorboard[name]], rel=1e-6), name
    assert [step for step, _ in in_csv["val/reward/mean"]] == [0, 2, 4, 6]
    assert [step for step, _ in in_csv["reward/mean"]] == [0, 2, 4]
    for name in ("optim/loss", "policy_shift/abs_mean"):
        assert [step for step, _ in in_csv.get(name, [])] == steps
    # Both stand at the number of updates done: what the next update takes.
    for name in ("lr-AdamW", "optim/learning_rate"):
        assert in_csv.get(name, []) == [(step, pytest.approx(1e-3 * 0.5**step)) for step, _ in in_csv.get(name, [])]
    assert bool(steps) == ("lr-AdamW" in in_csv) == any("DeviceStatsMonitor" in name for name in in_csv)


@pytest.mark.filterwarnings("ignore:The PyTorch Profiler default schedule will be overridden")
@pytest.mark.parametrize("profiler", [SimpleProfiler, AdvancedProfiler, PyTorchProfiler])
def test_a_profiler_sees_updates_and_the_phases_of_rollouts(fit, tmp_path, profiler):
    fit(trainer={"profiler": profiler(dirpath=tmp_path, filename="profile")})
    (report,) = (path.read_text() for path in tmp_path.glob("fit-profile*.txt"))
    if profiler is PyTorchProfiler:
        assert "aten::mm" in report
        return
    for name in ("[Strategy]SingleDeviceStrategy.training_step", "[LightningModule]PolicyModule.optimizer_step"):
        assert name in report
    for phase in ("sync", "generate", "reward"):
        assert f"[RolloutDataModule]{phase}" in report
