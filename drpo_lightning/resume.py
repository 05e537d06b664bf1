"""Which checkpoint `--ckpt_path` means, and how a run goes on in the log folder of the one that it resumes."""

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.rank_zero import rank_zero_info

from drpo_lightning.callbacks import PolicyCheckpoint
from drpo_lightning.checkpoints import newest_checkpoint, verify_checkpoint
from drpo_lightning.errors import SettingError
from drpo_lightning.log_position import reopen_logs, take_folders
from drpo_lightning.output_folders import claim_output_folders

SPECIAL = ("best", "hpc")
"""What else Lightning understands under `ckpt_path`."""


def checkpoint_folders(trainer: Trainer) -> list[Path]:
    """Folders that runs of this configuration write checkpoints to: of every version, unless one is configured.

    Args:
        trainer: before its run has begun.
    """
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and not c.save_weights_only]
    folders = [Path(callback.dirpath) for callback in callbacks if callback.dirpath is not None]
    if len(folders) < len(callbacks):
        folders += _default_folders(trainer)
    return list(dict.fromkeys(folders))


def _default_folders(trainer: Trainer) -> list[Path]:
    """Where Lightning puts checkpoints without a `dirpath`."""
    if not trainer.loggers:
        return [Path(trainer.default_root_dir) / "checkpoints"]
    logger = trainer.loggers[0]
    runs = Path(logger.save_dir or trainer.default_root_dir) / str(logger.name)
    # Not `version`, which chooses one if none is configured.
    if (version := getattr(logger, "_version", None)) is not None:
        return [runs / (version if isinstance(version, str) else f"version_{version}") / "checkpoints"]
    return sorted(runs.glob("*/checkpoints"))


def checkpoint_to_resume(trainer: Trainer, asked: str | None) -> str | None:
    """The checkpoint that `--ckpt_path` means, whole.

    Args:
        trainer: before its run has begun.
        asked: `last` for the newest whole one of this configuration, or a path.

    Returns:
        Its path; None without one, also if `last` is asked for and there is none yet.

    Raises:
        SettingError: if the path is no whole checkpoint, or `last` finds none but damaged ones.
    """
    if asked is None or asked in SPECIAL or "://" in asked:
        return asked
    try:
        if asked != "last":
            verify_checkpoint(asked)
            return asked
        newest = newest_checkpoint(*checkpoint_folders(trainer))
    except ValueError as error:
        raise SettingError(f"`--ckpt_path {asked}`: {error}{_way_out(trainer, asked)}") from error
    except FileNotFoundError as error:
        raise SettingError(
            f"`--ckpt_path {asked}`: {error.filename!r} was removed while it was read: another run is writing there"
        ) from error
    return None if newest is None else str(newest)


def _way_out(trainer: Trainer, asked: str) -> str:
    """Names a whole checkpoint instead of a damaged one."""
    if asked == "last":
        return ". Move the damaged checkpoints away to start from the beginning"
    newest = newest_checkpoint(Path(asked).parent, *checkpoint_folders(trainer))
    return "" if newest is None else f". The newest whole checkpoint is {str(newest)!r}"


def read_notes(checkpoint: str, *, weights_only: bool = True) -> dict[str, Any]:
    """What a checkpoint holds; of a folder of shards all but the shards. Empty for one that Lightning has to find.

    Args:
        checkpoint: see `checkpoint_to_resume`.
        weights_only: whether the run will load it so; one that may run code is not read here.
    """
    if not weights_only or checkpoint in SPECIAL or "://" in checkpoint:
        return {}
    path = Path(checkpoint)
    file = path / "meta.pt" if path.is_dir() else path
    notes: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return notes


def say_where_it_goes_on(trainer: Trainer, checkpoint: str, notes: Mapping[str, Any]) -> None:
    """Says how far the run of a checkpoint was.

    Args:
        trainer: before its run has begun.
        checkpoint: its name.
        notes: see `read_notes`; nothing is said of those without the progress of a training.

    Raises:
        SettingError: if the run is to be shorter than that.
    """
    if "loops" not in notes:
        return
    rollouts = notes["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    if trainer.max_epochs is not None and -1 < trainer.max_epochs < rollouts:
        raise SettingError(
            f"`trainer.max_epochs` must be at least the {rollouts} rollouts behind the checkpoint {checkpoint!r}, got "
            f"{trainer.max_epochs}; set it to {rollouts} plus those to add, or begin anew without `--ckpt_path`"
        )
    rank_zero_info(f"Going on from {checkpoint}, after {rollouts} rollouts, {notes['global_step']} updates")


def go_on_as_its_run(trainer: Trainer, notes: Mapping[str, Any], held: ExitStack) -> None:
    """Lets a run go on as that of a checkpoint: TensorBoard's and CSV loggers in its folder, from where it was saved.

    What was logged there after it is removed once the checkpoint is accepted: the run logs it again. The checkpoint
    itself is the run's own, to be removed when `PolicyCheckpoint` has a newer one to keep.

    Args:
        trainer: before its run has begun.
        notes: the checkpoint's, see `read_notes`.
        held: see `claim_output_folders`.

    Raises:
        SettingError: if a folder cannot be written to, or another run writes there.
    """
    positions = notes.get("logs", [])
    take_folders(trainer.loggers, positions)
    claim_output_folders(trainer, held)
    trainer.callbacks.append(_OnceAccepted(reopen_logs(trainer.loggers, positions)))  # type: ignore[attr-defined]
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, PolicyCheckpoint):
            callback.owns_resumed = True
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # it is the run's own


class _OnceAccepted(Callback):
    """Does something when the whole checkpoint has been restored, and the other callbacks have begun.

    Args:
        action: what is done.
    """

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Does it."""
        self.action()
