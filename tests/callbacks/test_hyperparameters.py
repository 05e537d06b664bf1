"""The HParams tab: every run stands in it once, with its settings and what it came to."""

import json
import warnings
from typing import Literal
from urllib.request import Request, urlopen

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2

from drpo_lightning.callbacks import PolicyCheckpoint, RolloutStatistics
from drpo_lightning.callbacks.hyperparameters import HyperparameterLogger, column_type, experiment
from drpo_lightning.charts import FIGURES
from drpo_lightning.datamodules import ArithmeticPrompts
from drpo_lightning.objectives import DPPO, DRPO
from scripts.screenshot import tensorboard

STATUSES = [f"STATUS_{name}" for name in ("UNKNOWN", "SUCCESS", "FAILURE", "RUNNING")]
VALIDATION = {"val_prompts": ArithmeticPrompts("validation", max_operand=9, num_validation=20), "val_num_samples": 2}


class RaisesAt(Callback):
    """Ends a run in the first update of its second rollout."""

    def __init__(self, exception):
        self.exception = exception

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1:
            raise self.exception


def logger_of(folder, name):
    return TensorBoardLogger(folder, name="", version=name, default_hp_metric=False)


def fit(make_run, logger, *callbacks, objective=None, **arguments):
    settings = {"logger": logger, "max_epochs": 2, "num_sanity_val_steps": -1} | arguments.pop("trainer", {})
    run = make_run(
        *callbacks,
        HyperparameterLogger(),
        trainer=settings,
        module={"objective": objective or DRPO(0.2), **arguments.pop("module", {})},
        data=VALIDATION,
    )
    run.fit(**arguments)
    return run


@pytest.fixture
def logdir(make_run, tmp_path):
    """A run by each of two objectives, one that was interrupted and one that failed."""
    schedule = {
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        "lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5),
    }
    fit(make_run, logger_of(tmp_path, "drpo"), RolloutStatistics(), module=schedule)
    fit(make_run, logger_of(tmp_path, "dppo"), RolloutStatistics(), objective=DPPO(threshold=0.3))
    with pytest.raises(SystemExit):
        fit(make_run, logger_of(tmp_path, "interrupted"), RolloutStatistics(), RaisesAt(KeyboardInterrupt()))
    with pytest.raises(LookupError):
        fit(make_run, logger_of(tmp_path, "failed"), RolloutStatistics(), RaisesAt(LookupError()))
    return tmp_path


def ask(url, path, **request):
    body = Request(
        f"{url}/data/plugin/hparams/{path}", json.dumps(request).encode(), {"Content-Type": "application/json"}
    )
    with urlopen(body, timeout=30) as answer:
        return json.load(answer)


def sessions_of(url):
    """The entries of the tab by run."""
    columns = ask(url, "experiment", experimentName="")
    asked = [{"hparam": info["name"]} for info in columns["hparamInfos"]]
    asked += [{"metric": info["name"]} for info in columns["metricInfos"]]
    groups = ask(url, "session_groups", colParams=asked, allowedStatuses=STATUSES, startIndex=0, sliceSize=100)
    return columns, {group["name"]: group for group in groups["sessionGroups"]}


def metrics_of(group):
    return {metric["name"]["tag"]: (metric["value"], metric["trainingStep"]) for metric in group["metricValues"]}


def test_tensorboard_lists_every_run_once_with_settings_and_metrics(logdir):
    with tensorboard(logdir) as url:
        columns, groups = sessions_of(url)
        with urlopen(f"{url}/data/runs", timeout=30) as answer:
            assert sorted(json.load(answer)) == sorted(groups) == ["dppo", "drpo", "failed", "interrupted"]
    assert all(len(group["sessions"]) == 1 for group in groups.values())
    statuses = {name: group["sessions"][0]["status"] for name, group in groups.items()}
    assert statuses == {
        "drpo": "STATUS_SUCCESS",
        "dppo": "STATUS_SUCCESS",
        "interrupted": "STATUS_FAILURE",
        "failed": "STATUS_FAILURE",
    }
    settings = groups["drpo"]["hparams"]
    assert settings["objective"] == str(DRPO(0.2))
    assert settings["objective.delta"] == 0.2
    assert settings["learning_rate"] == pytest.approx(1e-3), "before the schedule"
    assert [settings[name] for name in ("num_prompts", "group_size", "num_updates", "seed")] == [4, 4, 2, 0]
    assert settings["engine"] == "TransformersEngine"
    assert settings["engine_dtype"] == "float32"
    assert settings["precision"] == "32-true"
    assert groups["dppo"]["hparams"]["objective.threshold"] == 0.3
    assert "objective.delta" not in groups["dppo"]["hparams"]
    assert {info["name"] for info in columns["hparamInfos"]} >= settings.keys() | groups["dppo"]["hparams"].keys()
    for name, group in groups.items():
        scalars = EventAccumulator(str(logdir / name)).Reload()
        metrics = metrics_of(group)
        for tag in ("val/pass@1", "val/reward/mean", "reward/mean"):
            last = scalars.Scalars(tag)[-1]
            assert metrics[tag] == (pytest.approx(last.value), last.step)
        best = max(scalars.Scalars("val/reward/mean"), key=lambda event: (event.value, -event.step))
        assert metrics["best/val/reward/mean"] == (pytest.approx(best.value), best.step)
        assert "policy_shift/beyond_0.2_fraction" not in metrics, "nothing has logged it"


def test_a_running_run_is_listed(make_run, make_recorder, tmp_path):
    seen = []

    def look(trainer, pl_module, batch_idx):
        trainer.logger.experiment.flush()
        seen.append(EventAccumulator(trainer.log_dir).Reload().SummaryMetadata("_hparams_/session_start_info"))

    fit(make_run, logger_of(tmp_path, "run"), make_recorder(look), trainer={"max_epochs": 1})
    assert len(seen) == 2


def test_a_run_without_a_validation_or_an_engine_is_listed(make_run, tmp_path):
    class Raises(Callback):
        def on_fit_start(self, trainer, pl_module):
            raise LookupError

    logger = logger_of(tmp_path, "run")
    with pytest.raises(LookupError):
        make_run(HyperparameterLogger(), Raises(), trainer={"logger": logger}).fit()
    tags = EventAccumulator(logger.log_dir).Reload().Tags()
    assert "_hparams_/session_end_info" in tags["tensors"]
    assert tags["scalars"] == []


def test_a_validation_alone_is_not_listed(make_run, tmp_path):
    logger = logger_of(tmp_path, "run")
    run = make_run(HyperparameterLogger(), trainer={"logger": logger}, data=VALIDATION)
    run.trainer.validate(run.module, run.data)
    tags = EventAccumulator(logger.log_dir).Reload().Tags()
    assert "val/pass@1" in tags["scalars"]
    assert not [tag for tag in tags["scalars"] + tags["tensors"] if tag.startswith(("best/", "_hparams_"))]


def test_a_resumed_run_keeps_its_best_figures(make_run, tmp_path):
    fit(make_run, False, PolicyCheckpoint(dirpath=tmp_path), trainer={"enable_checkpointing": True})
    path = tmp_path / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    states = {name: state for name, state in checkpoint["callbacks"].items() if "HyperparameterLogger" in name}
    (best,) = states.values()
    assert best.keys() == {"val/pass@1", "val/reward/mean"}
    best |= dict.fromkeys(best, 2.0)
    torch.save(checkpoint, path)
    logger = logger_of(tmp_path, "resumed")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*exists and is not empty")
        trainer = {"max_epochs": 3, "enable_checkpointing": True}
        fit(make_run, logger, PolicyCheckpoint(dirpath=tmp_path), trainer=trainer, ckpt_path=path)
    scalars = EventAccumulator(logger.log_dir).Reload().Tags()["scalars"]
    assert "val/reward/mean" in scalars
    assert "best/val/reward/mean" not in scalars, "none is better than 2"


def test_the_tab_shows_the_settings_that_tell_runs_apart_first():
    infos = experiment(DRPO()).hparam_infos
    assert [info.name for info in infos if info.differs] == [
        "learning_rate",
        "model",
        "num_updates",
        "objective",
        "seed",
    ]
    metrics = [info.name.tag for info in experiment(DRPO()).metric_infos]
    assert metrics == ["best/val/pass@1", *FIGURES, "best/val/reward/mean"]


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        (float, "FLOAT64"),
        (float | None, "FLOAT64"),
        (int | float, "FLOAT64"),
        (bool, "BOOL"),
        (str | None, "STRING"),
        (Literal["a", "b"], "STRING"),
        (float | str, "STRING"),
    ],
)
def test_a_column_has_the_type_of_its_setting(annotation, expected):
    assert column_type(annotation) == api_pb2.DataType.Value(f"DATA_TYPE_{expected}")


def test_another_module_is_refused(make_run):
    run = make_run(HyperparameterLogger())
    with pytest.raises(TypeError, match="`HyperparameterLogger` needs a `PolicyModule`, got BoringModel"):
        run.trainer.fit(BoringModel(), datamodule=run.data)
