"""Checkpoints that are also written when a run is interrupted."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class PolicyCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint` that keeps the last state, also after Ctrl-C or an exception.

    After an exception only on one rank: on several the others know nothing of it, and would be waited for.

    Args:
        save_last: see `ModelCheckpoint`.
        save_on_exception: whether an interrupted run writes a checkpoint.
        **kwargs: arguments of `ModelCheckpoint`.
    """

    def __init__(self, save_last: bool = True, save_on_exception: bool = True, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(save_last=save_last, save_on_exception=save_on_exception, **kwargs)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves after Ctrl-C, which reaches every rank, and after an exception on a run of one rank."""
        if trainer.world_size == 1 or isinstance(exception, KeyboardInterrupt):
            super().on_exception(trainer, pl_module, exception)
