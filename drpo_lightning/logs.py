"""One way to log: every scalar stands at the number of optimizer steps completed, every line is said once."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from lightning_utilities.core.rank_zero import rank_zero_info

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def log_interval(trainer: "Trainer") -> int:
    """Optimizer steps from one log entry to the next: `trainer.log_every_n_steps`; with 0, more than any run has."""
    return int(trainer.log_every_n_steps) or sys.maxsize  # type: ignore[attr-defined]


def updates_completed(trainer: "Trainer", pl_module: "LightningModule") -> int:
    """Optimizer steps that the weights have behind them.

    `trainer.validate` does not restore the trainer's own count: there it is that of the checkpoint, 0 without one.
    """
    if trainer.state.fn != "validate":
        return int(trainer.global_step)
    return int(trainer.global_step or getattr(pl_module, "checkpoint_step", 0))


def log_metrics(trainer: "Trainer", pl_module: "LightningModule", metrics: Mapping[str, float]) -> None:
    """Logs values that are the same on every rank, at the optimizer steps completed so far.

    `LightningModule.log` puts epoch ends one step lower, says nothing during the validation before the first update,
    nor that a checkpoint which is validated has updates behind it, and takes half a millisecond for a scalar. The
    values are also Lightning's callback metrics, for `ModelCheckpoint`, `EarlyStopping` and the like, and what
    `trainer.validate` returns: there Lightning logs them itself.

    Args:
        trainer: the trainer; its loggers are written to, on rank 0.
        pl_module: the module whose hook is running.
        metrics: values by name.
    """
    values = {name: float(value) for name, value in metrics.items()}
    step = updates_completed(trainer, pl_module)
    if trainer.state.fn == "validate":
        values["step"] = step  # what Lightning takes as the place on the x axis
        # The mean over ranks changes nothing, and Lightning warns where it is not taken.
        pl_module.log_dict(values, batch_size=1, sync_dist=True)
        return
    for logger in trainer.loggers:
        logger.log_metrics(values, step=step)
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})


def announce(trainer: "Trainer", line: str) -> None:
    """Says on rank 0 how a run is set, unless one of its callbacks shows all such lines (`summarizes_run`).

    Args:
        trainer: the trainer.
        line: what is set.
    """
    if not any(getattr(callback, "summarizes_run", False) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        rank_zero_info(line)
