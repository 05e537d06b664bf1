"""TensorBoard's HParams tab: the settings that tell runs apart, beside what each run came to."""

import time
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType
from typing import Any, get_args, get_type_hints

from lightning.pytorch import Callback, LightningModule, Trainer
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo

from drpo_lightning.callbacks.tensorboard import tensorboard_writers
from drpo_lightning.charts import BEST_PREFIX, FIGURES, HELD_OUT
from drpo_lightning.datamodules import RolloutDataModule
from drpo_lightning.disk import why_no_room
from drpo_lightning.modules import PolicyModule
from drpo_lightning.objectives import Objective
from drpo_lightning.rollout.engine import RolloutEngine
from drpo_lightning.rollout.hooks import RolloutHooks

NUMBERS = ("group_size", "learning_rate", "num_prompts", "num_updates", "seed")
TEXTS = ("advantage", "aggregation", "engine", "engine_dtype", "model", "objective", "precision")
SHOWN = ("learning_rate", "model", "num_updates", "objective", "seed")
"""Settings that the tab shows before others are chosen: it shows five, and the first five metrics."""


class HyperparameterLogger(Callback, RolloutHooks):
    """Enters the run into TensorBoard's HParams tab, where runs are compared, of different objectives too.

    Settings: `objective` in full, and each setting of it as `objective.<setting>`; `learning_rate` (before any
    schedule), `seed` (of the data), `num_updates`, `num_prompts`, `group_size`, `aggregation`, `advantage`,
    `precision`, `engine`, `engine_dtype`, `model`. Metrics: the last values of `drpo_lightning.charts.FIGURES`, and the
    largest ones of the validation, which are logged as `best/val/pass@1` and `best/val/reward/mean`.

    The entry is made when the engine runs, shows the values so far, and is marked at the end of the fit as a success,
    or as a failure after an exception or Ctrl-C. It stands in the run's own folder.

    Raises:
        TypeError: at the start, if the module is no `PolicyModule` or the data no `RolloutDataModule`.
    """

    def __init__(self) -> None:
        self._best: dict[str, float] = {}
        self._is_fitting = False
        self._is_entered = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Expects the engine."""
        run_parts(trainer)
        self._is_fitting, self._is_entered = True, False

    def on_engine_refresh(self, trainer: Trainer, pl_module: LightningModule, engine: RolloutEngine) -> None:  # noqa: ARG002
        """Makes the entry: the precision of the engine is known by now."""
        self._enter(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Logs the figures that are better than all before."""
        if not self._is_fitting:
            return
        metrics = trainer.callback_metrics
        values = {tag: float(metrics[tag]) for tag in HELD_OUT if tag in metrics}
        better = {tag: value for tag, value in values.items() if value > self._best.get(tag, -float("inf"))}
        self._best |= better
        for writer in tensorboard_writers(trainer):
            for tag, value in better.items():
                writer.add_scalar(f"{BEST_PREFIX}{tag}", value, trainer.global_step)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Marks the entry."""
        self._finish(trainer, api_pb2.STATUS_SUCCESS)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Marks the entry, also after Ctrl-C; not where there is no room for it."""
        if not why_no_room(exception):
            self._finish(trainer, api_pb2.STATUS_FAILURE)

    def state_dict(self) -> dict[str, Any]:
        """The best figures, which a resumed run goes on from."""
        return dict(self._best)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the best figures."""
        self._best = dict(state_dict)

    def _enter(self, trainer: Trainer) -> None:
        if not self._is_fitting or self._is_entered:
            return
        self._is_entered = True
        module, data = run_parts(trainer)
        start = session_start(run_settings(trainer, module, data))
        columns = experiment(module.objective)
        write_summary(trainer, metadata.EXPERIMENT_TAG, HParamsPluginData(experiment=columns))
        write_summary(trainer, metadata.SESSION_START_INFO_TAG, HParamsPluginData(session_start_info=start))

    def _finish(self, trainer: Trainer, status: Any) -> None:  # noqa: ANN401
        if not self._is_fitting:
            return
        self._enter(trainer)
        self._is_fitting = False
        end = SessionEndInfo(status=status, end_time_secs=time.time())
        write_summary(trainer, metadata.SESSION_END_INFO_TAG, HParamsPluginData(session_end_info=end))


def run_parts(trainer: Trainer) -> tuple[PolicyModule, RolloutDataModule]:
    """The module and the data of a run; raises `TypeError` if they are of other kinds."""
    module, data = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(module, PolicyModule):
        raise TypeError(f"`HyperparameterLogger` needs a `PolicyModule`, got {type(module).__name__}")
    if not isinstance(data, RolloutDataModule):
        raise TypeError(f"`HyperparameterLogger` needs a `RolloutDataModule`, got {type(data).__name__}")
    return module, data


def run_settings(trainer: Trainer, module: PolicyModule, data: RolloutDataModule) -> dict[str, Any]:
    """The settings that tell runs apart, by name; None where an objective leaves one open."""
    group = trainer.optimizers[0].param_groups[0]
    return {
        "objective": str(module.objective),
        **{f"objective.{name}": value for name, value in vars(module.objective).items()},
        "learning_rate": group.get("initial_lr", group["lr"]),
        "seed": data.seed,
        "num_updates": data.num_updates,
        "num_prompts": data.num_prompts,
        "group_size": data.group_size,
        "aggregation": module.aggregation,
        "advantage": data.advantage,
        "precision": str(trainer.precision),
        "engine": _engine_name(data.engine),
        "engine_dtype": data.engine.dtype_name,
        "model": module.model_name,
    }


def experiment(objective: Objective) -> api_pb2.Experiment:
    """The columns of the tab.

    TensorBoard takes them from any one of the runs: every run names the settings of all objectives.
    """
    columns: dict[str, Any] = dict.fromkeys(NUMBERS, float) | dict.fromkeys(TEXTS, str)
    for kind in (*subclasses(Objective), type(objective)):
        if is_dataclass(kind):
            hints = get_type_hints(kind)
            columns |= {f"objective.{field.name}": hints[field.name] for field in fields(kind)}
    settings = [
        # TensorBoard shows those of which it is said that they differ.
        api_pb2.HParamInfo(name=name, type=column_type(kind), differs=name in SHOWN)
        for name, kind in sorted(columns.items())
    ]
    best = {f"{BEST_PREFIX}{tag}": f"best {title}" for tag, title in HELD_OUT.items()}
    first = f"{BEST_PREFIX}val/pass@1"
    metrics = {first: best[first]} | FIGURES | best
    titled = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag), display_name=t) for tag, t in metrics.items()]
    return api_pb2.Experiment(hparam_infos=settings, metric_infos=titled)


def column_type(annotation: Any) -> Any:  # noqa: ANN401
    """TensorBoard's type for the values of a setting, by the setting's annotation."""
    kinds = {kind for kind in get_args(annotation) or (annotation,) if kind is not NoneType}
    if kinds == {bool}:
        return api_pb2.DATA_TYPE_BOOL
    return api_pb2.DATA_TYPE_FLOAT64 if kinds <= {int, float} else api_pb2.DATA_TYPE_STRING


def subclasses(kind: type) -> list[type]:
    """All classes below one."""
    children: list[type] = kind.__subclasses__()
    return children + [below for child in children for below in subclasses(child)]


def session_start(settings: Mapping[str, Any]) -> SessionStartInfo:
    """The entry of a run; settings that are None are left out."""
    start = SessionStartInfo(start_time_secs=time.time())
    for name, value in settings.items():
        if isinstance(value, bool):
            start.hparams[name].bool_value = value
        elif isinstance(value, int | float):
            start.hparams[name].number_value = value
        elif value is not None:
            start.hparams[name].string_value = str(value)
    return start


def write_summary(trainer: Trainer, tag: str, content: HParamsPluginData) -> None:
    """Writes what the HParams tab is made of, into the run's own folder."""
    value = Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(content), tensor=metadata.NULL_TENSOR)
    for writer in tensorboard_writers(trainer):
        writer.file_writer.add_summary(Summary(value=[value]))  # type: ignore[attr-defined]


def _engine_name(engine: RolloutEngine) -> str:
    """The engine's class, and in brackets that of the one inside of it."""
    inner = getattr(engine, "engine", None)
    name = type(engine).__name__
    return f"{name}({_engine_name(inner)})" if isinstance(inner, RolloutEngine) else name
