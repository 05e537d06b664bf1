"""The copy of the configuration that a run leaves: without the values that came from the environment."""

import logging
import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc

from drpo_lightning.changes import Change, changes, class_name
from drpo_lightning.disk import whole_file
from drpo_lightning.errors import SettingError

OF_ONE_START = ("ckpt_path", "weights_only", "verbose", "trainer.max_epochs", "trainer.max_steps", "trainer.max_time")
"""Settings that a run may go on with another value of."""
OF_THE_CHECKPOINT = ("optimizer", "lr_scheduler")
"""Of the model: what a checkpoint holds with its settings, which win."""
LOG = logging.getLogger(__name__)
UNRESOLVED: dict[str, str] = {}
"""Whole texts of settings that hold values of the environment, and the same with `${oc.env:NAME}` in their places."""


def note_interpolations() -> None:
    """Has `${oc.env:NAME}` remember from now on the settings that it stands in."""
    OmegaConf.register_resolver("oc.env", _env, replace=True)


def _env(name: str, *default: Any, _root_: DictConfig) -> Any:  # noqa: ANN401
    texts, names = (_texts(_resolved(_root_, env)) for env in (oc.env, _interpolation))
    UNRESOLVED.update((text, name) for text, name in zip(texts, names, strict=True) if text != name)
    return oc.env(name, *default)


def _interpolation(name: str, *default: Any) -> Any:  # noqa: ANN401
    """In place of `oc.env`: what stands for a variable that is set."""
    return f"${{oc.env:{name}}}" if os.environ.get(name) else oc.env(name, *default)


def _resolved(config: DictConfig, env: Callable[..., Any]) -> Any:  # noqa: ANN401
    """A configuration with `${oc.env:NAME}` as another resolver has it."""
    OmegaConf.register_resolver("oc.env", env, replace=True)
    try:
        return OmegaConf.to_container(config, resolve=True)
    finally:
        note_interpolations()


def _texts(value: Any) -> list[str]:  # noqa: ANN401
    """All texts in nested dicts and lists, without keys."""
    if isinstance(value, dict | list):
        return [text for entry in (value.values() if isinstance(value, dict) else value) for text in _texts(entry)]
    return [value] if isinstance(value, str) else []


def unresolved(value: Any) -> Any:  # noqa: ANN401
    """Plain settings with the interpolations that they were made of; a `class_path` stays."""
    if isinstance(value, dict):
        return {key: entry if key == "class_path" else unresolved(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [unresolved(entry) for entry in value]
    return UNRESOLVED.get(value, value) if isinstance(value, str) else value


def in_effect(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The settings that a run goes on with: of an optimizer and a schedule of the same class, those it had.

    Args:
        before: nested dicts, of the run so far, in effect.
        now: the same, as asked for.
    """
    old, new = before["model"], now["model"]
    kept = {name: old[name] for name in OF_THE_CHECKPOINT if class_name(old[name]) == class_name(new[name])}
    return now | {"model": new | kept}


def applied_changes(before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """Settings that a run goes on with another value of; a longer run is no difference. Arguments: see `in_effect`."""
    return [change for change in changes(before, in_effect(before, now)) if change.name not in OF_ONE_START]


def said_of_changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What to say of a run that goes on with other settings. Arguments: see `in_effect`."""
    if found := applied_changes(before, now):
        yield f"The run goes on with other settings than it had: {'; '.join(map(str, found))}"
    if ignored := list(map(str, changes(in_effect(before, now), now))):
        yield (
            f"Not applied: {'; '.join(ignored)}. The optimizer and its schedule go on with the settings in the "
            "checkpoint; for another one start a new run from the exported policy"
        )


class SaveUnresolvedConfig(SaveConfigCallback):
    """Saves the configuration with `${oc.env:NAME}` where that stood: their values may be keys.

    Checkpoints have it too. A run that goes on says how its own differs, once the checkpoint is accepted, and keeps
    that of the updates before as `config-until-<updates>.yaml`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self._path = Path(self.config_filename)
        self._settings: dict[str, Any] = {}
        self._before: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Writes `config.yaml` into the log folder, on rank 0; over that of a run that goes on, not yet."""
        folder = trainer.log_dir  # collective
        assert folder is not None, "the trainer has a `default_root_dir`"
        self._path = Path(folder) / self.config_filename
        checked = OmegaConf.create(self.parser.dump(self.config, skip_none=False))
        self._settings = unresolved(OmegaConf.to_container(checked))
        if trainer.is_global_zero and not (stage == "fit" and self._path.is_file()):
            _write(self._path, self._settings)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Notes the configuration in effect."""
        checkpoint["config"] = self._in_effect

    @property
    def _in_effect(self) -> dict[str, Any]:
        return self._settings if self._before is None else in_effect(self._before, self._settings)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Takes the configuration of the updates so far."""
        self._before = checkpoint.get("config")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Writes the configuration of a run that goes on, and says what has changed.

        Raises:
            SettingError: if the optimizer is of another class than the one whose state has been restored.
        """
        if self._before is not None:
            _check_optimizer(self._before, self._settings)
        if not trainer.is_global_zero:
            return
        if self._before is not None:
            if applied_changes(self._before, self._settings):
                _write(self._path.with_stem(f"{self._path.stem}-until-{trainer.global_step}"), self._before)
            for sentence in said_of_changes(self._before, self._settings):
                LOG.warning(sentence)
        _write(self._path, self._in_effect)


def _check_optimizer(before: dict[str, Any], now: dict[str, Any]) -> None:
    had, has = (class_name(settings["model"]["optimizer"]) for settings in (before, now))
    if had and has and had != has:
        raise SettingError(
            f"`model.optimizer` must be {had}, whose state is in the checkpoint, got {has}; for another one start a "
            "new run from the exported policy"
        )


def _write(path: Path, settings: dict[str, Any]) -> None:
    content = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    with whole_file(path) as unfinished:
        unfinished.write_text(f"# lightning.pytorch=={version('lightning')}\n{content}", encoding="utf-8")
