"""Checkpoints that are also written when a run is interrupted."""

import os
import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

NOTICE = b"\nCtrl-C: the run ends before the next update, with a checkpoint. Once more: it ends at once, without one.\n"


class PolicyCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint` that keeps the last state, also after Ctrl-C or an exception.

    On several ranks a checkpoint needs them all at the same place. So Ctrl-C, on any of them, ends the run before the
    next update (a rollout in hand is completed first), a second one ends it at once and without a checkpoint. After
    an exception on several ranks nothing is saved: the others know nothing of it, and would be waited for.

    Args:
        save_last: whether `last.ckpt` is kept: as a link to the newest checkpoint, or, with `True`, saved a second
            time, which folders on remote file systems need.
        save_on_exception: whether an interrupted run writes a checkpoint.
        **kwargs: arguments of `ModelCheckpoint`.
    """

    def __init__(
        self,
        save_last: bool | Literal["link"] = "link",
        save_on_exception: bool = True,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(save_last=save_last, save_on_exception=save_on_exception, **kwargs)
        self._is_global_zero = False
        self._is_interrupted = False
        self._ranks_agree = False
        self._handler_before: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """On several ranks, takes Ctrl-C over."""
        super().on_train_start(trainer, pl_module)
        self._is_global_zero = trainer.is_global_zero
        if trainer.world_size > 1 and self.save_on_exception:
            self._handler_before = signal.signal(signal.SIGINT, self._interrupt)

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        batch: Any,  # noqa: ANN401, ARG002
        batch_idx: int,
    ) -> None:
        """Ends the run before an update if a rank has been interrupted."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._end_if_interrupted(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves if it is time to; ends the run, before the next rollout, if a rank has been interrupted."""
        super().on_train_epoch_end(trainer, pl_module)
        self._end_if_interrupted(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives Ctrl-C back; see `ModelCheckpoint`."""
        self._give_signal_back()
        if not trainer.fast_dev_run:  # type: ignore[attr-defined] # where Lightning would still write `last.ckpt`
            super().on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves after Ctrl-C, and after an exception on a run of one rank."""
        self._give_signal_back()
        if trainer.world_size == 1 or self._ranks_agree:
            super().on_exception(trainer, pl_module, exception)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self._is_interrupted:
            raise KeyboardInterrupt
        self._is_interrupted = True
        if self._is_global_zero:
            os.write(2, NOTICE)  # `print` may be what has been interrupted

    def _end_if_interrupted(self, trainer: Trainer) -> None:
        if self._handler_before is None:
            return
        if trainer.strategy.reduce_boolean_decision(self._is_interrupted, all=False):
            self._ranks_agree = True
            raise KeyboardInterrupt

    def _give_signal_back(self) -> None:
        """Restores the handler of Ctrl-C, unless Lightning has set one for its shutdown."""
        if signal.getsignal(signal.SIGINT) == self._interrupt:
            signal.signal(signal.SIGINT, self._handler_before)
        self._handler_before = None

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Removes what has the name first: shards of more ranks would stay in it, a link would be written through."""
        path = Path(filepath)
        if trainer.is_global_zero and path.is_symlink():
            path.unlink()
        elif trainer.is_global_zero and path.is_dir():
            shutil.rmtree(path)
        trainer.strategy.barrier()
        super()._save_checkpoint(trainer, filepath)
