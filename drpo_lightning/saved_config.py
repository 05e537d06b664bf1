"""The copy of the configuration that a run leaves: without the values that came from the environment."""

import os
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning_utilities.core.rank_zero import rank_zero_warn
from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc

from drpo_lightning.disk import whole_file

OF_ONE_START = ("ckpt_path", "weights_only", "verbose", "trainer.max_epochs", "trainer.max_steps", "trainer.max_time")
"""Settings that a run may go on with another value of."""
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


def changed_settings(before: Any, now: Any) -> list[str]:  # noqa: ANN401
    """Settings that differ between two configurations, as `name: before -> now`; a longer run is no difference.

    Args:
        before: nested dicts, of the run so far.
        now: the same, of its continuation.
    """
    old, new = dict(_settings(before)), dict(_settings(now))
    names = [name for name in {**old, **new} if name not in OF_ONE_START and old.get(name) != new.get(name)]
    return [f"`{name}`: {old.get(name)!r} -> {new.get(name)!r}" for name in names]


def _settings(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    """Names and values of all settings that hold no others."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not entries:
        yield name, value
    for key, entry in entries:
        yield from _settings(entry, f"{name}.{key}" if name else str(key))


class SaveUnresolvedConfig(SaveConfigCallback):
    """Saves the configuration with `${oc.env:NAME}` where that stood: their values may be keys."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Writes `config.yaml` into the log folder, once and on rank 0."""
        folder = trainer.log_dir  # collective
        if self.already_saved or not trainer.is_global_zero:
            return
        assert folder is not None, "the trainer has a `default_root_dir`"
        checked = OmegaConf.create(self.parser.dump(self.config, skip_none=False))
        settings = unresolved(OmegaConf.to_container(checked))
        content = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        path = Path(folder) / self.config_filename
        before = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else settings
        if changes := changed_settings(before, settings):
            rank_zero_warn(
                f"the run goes on with other settings than it had: {'; '.join(changes)}. The optimizer and its "
                "schedule take theirs from the checkpoint, the learning rate included"
            )
        with whole_file(path) as unfinished:
            unfinished.write_text(f"# lightning.pytorch=={version('lightning')}\n{content}", encoding="utf-8")
        self.already_saved = True
