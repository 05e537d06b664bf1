"""Runs as their log folders hold them: settings and scalars."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from drpo_lightning.errors import SettingError

EVENT_FILES = "events.out.tfevents*"
SETTINGS_FILE = "config.yaml"
"""What `LightningCLI` saves beside the events."""
KEPT_EVENTS = {"scalars": 0, "tensors": 1, "histograms": 1, "images": 1, "audio": 1, "compressedHistograms": 1}
"""Events kept of a tag by kind; 0 keeps all."""


class Curve(NamedTuple):
    """A scalar over a run.

    Attributes:
        steps: optimizer steps completed, ascending.
        values: one per step; may be NaN or infinite.
    """

    steps: list[int]
    values: list[float]


class Run(NamedTuple):
    """A run.

    Attributes:
        name: what tells its folder from those of the other runs.
        settings: as text, by key as on the command line.
        curves: by name of the scalar.
        seconds: from the first scalar to the last.
    """

    name: str
    settings: dict[str, str]
    curves: dict[str, Curve]
    seconds: float


def read_runs(folders: Iterable[str]) -> list[Run]:
    """All runs in or below some folders.

    Raises:
        SettingError: if a folder does not exist or has no events, or its settings cannot be read.
    """
    paths = list(dict.fromkeys(path for folder in folders for path in run_folders(folder)))
    return [read_run(path, name) for path, name in zip(paths, names(paths), strict=True)]


def run_folders(folder: str) -> list[Path]:
    """The folders with events in or below one, `version_2` before `version_10`."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise SettingError(f"the log folder {folder!r} does not exist")
    found = {path.parent.resolve() for path in root.rglob(EVENT_FILES)}
    if not found:
        raise SettingError(f"no run in {folder!r}: neither it nor a folder below it has a file {EVENT_FILES}")
    return sorted(found, key=lambda path: natural(str(path)))


def natural(text: str) -> list[tuple[float, str]]:
    """Sort key by which `version_2` is before `version_10`, and `beyond_0.05` before `beyond_0.1`."""
    parts = re.split(r"(\d+\.?\d*)", text)
    return [(float(part), "") if i % 2 else (0.0, part) for i, part in enumerate(parts)]


def names(paths: list[Path]) -> list[str]:
    """The folders below what they have in common; a single one with the folder that it is in."""
    common = Path(os.path.commonpath([path.parent for path in paths]))
    return [str(path.relative_to(common.parent if len(paths) == 1 else common)) for path in paths]


def read_run(folder: Path, name: str) -> Run:
    """The run in a folder with events."""
    try:
        events = EventAccumulator(str(folder), size_guidance=KEPT_EVENTS).Reload()
        settings = read_settings(folder / SETTINGS_FILE)
    except OSError as error:
        raise SettingError(f"the run in {str(folder)!r} cannot be read: {error.strerror}") from error
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    times = [event.wall_time for scalar in scalars.values() for event in scalar] or [0.0]
    curves = {}
    for tag, scalar in scalars.items():
        # A run that was resumed in its folder has some steps twice: the later ones count.
        values = dict(sorted({event.step: event.value for event in scalar}.items()))
        curves[tag] = Curve(list(values), list(values.values()))
    return Run(name, settings, curves, max(times) - min(times))


def read_settings(file: Path) -> dict[str, str]:
    """The flattened settings in a file; none without one."""
    if not file.is_file():
        return {}
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingError(f"the settings in {str(file)!r} cannot be read: {str(error).splitlines()[0]}") from error
    return dict(flattened(content)) if isinstance(content, Mapping) else {}


def flattened(settings: Any, key: str = "") -> Iterator[tuple[str, str]]:  # noqa: ANN401
    """Settings by dotted key, as the command line names them: `model.objective` and `model.objective.delta`.

    Objects in a list, such as callbacks, go by their class: their places differ as soon as one run has one more.
    """
    if isinstance(settings, Mapping) and "class_path" in settings:
        yield key, str(settings["class_path"]).removeprefix("drpo_lightning.")
        settings = settings.get("init_args") or {}
    if isinstance(settings, Mapping) and (settings or not key):
        for name, value in settings.items():
            yield from flattened(value, f"{key}.{name}" if key else str(name))
    elif isinstance(settings, list) and any(isinstance(value, Mapping) for value in settings):
        yield from flattened(by_class(settings), key)
    elif not isinstance(settings, Mapping):
        yield key, settings if isinstance(settings, str) else json.dumps(settings, ensure_ascii=False, default=str)


def by_class(objects: list[Any]) -> dict[str, Any]:
    """The objects of a list by the names of their classes; the second of a class has its number behind it."""
    named: dict[str, Any] = {}
    counts: Counter[str] = Counter()
    for value in objects:
        path = value.get("class_path", "") if isinstance(value, Mapping) else ""
        kind = str(path).rsplit(".", 1)[-1]
        counts[kind] += 1
        named[kind if kind and counts[kind] == 1 else f"{kind}{counts[kind]}"] = value
    return named
