"""Checkpoints that a run goes on from as if it had never been interrupted, killed or sent SIGTERM."""

import copy
import os
import weakref
from functools import partial
from typing import Any, Literal

from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from drpo_lightning.callbacks.end_request import EndRequest
from drpo_lightning.checkpoints import StreamedCheckpointIO, save_checkpoint
from drpo_lightning.disk import why_no_room
from drpo_lightning.errors import NonFiniteError, SettingError
from drpo_lightning.log_position import log_positions
from drpo_lightning.rewards import Reward
from drpo_lightning.rollout.hooks import RolloutHooks
from drpo_lightning.rollout.weights import WeightSource

LOGS = "logs"
"""Key of a checkpoint under which the positions of the loggers stand."""


class PolicyCheckpoint(ModelCheckpoint, RolloutHooks):
    """Lightning's `ModelCheckpoint` for `--ckpt_path last`: no kill of the run loses more than its last checkpoint.

    A checkpoint is written under another name (`*.ckpt.partial`), sent to the disk and renamed, and can be verified
    later. It knows how far the logs were written. It is saved when all is logged that belongs before it: before the
    next update, or at the end of the rollout's last.

    Ctrl-C and SIGTERM, on any rank, end the run before the next update, with a checkpoint. After SIGTERM the command
    exits with status 75 ("try again later"), or 143 where SIGTERM has killed it before it trains. On one rank
    completions that are being sampled or scored are given up at once, and the checkpoint is one of before them; several
    ranks complete theirs first. A second Ctrl-C ends the run at once and without a checkpoint. After an exception on
    several ranks nothing is saved: the others know nothing of it, and would be waited for.

    Weights that are NaN or infinite are not saved, so that they never take the place of sound ones.

    Args:
        save_last: whether `last.ckpt` is kept: as a link to the newest checkpoint, or, with `True`, saved a second
            time, which folders on remote file systems need.
        save_on_exception: whether an interrupted run writes a checkpoint.
        **kwargs: arguments of `ModelCheckpoint`.

    Raises:
        NonFiniteError: on every rank, instead of saving weights that are NaN or infinite.
    """

    def __init__(
        self,
        save_last: bool | Literal["link"] = "link",
        save_on_exception: bool = True,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(save_last=save_last, save_on_exception=save_on_exception, **kwargs)
        self._end_request = EndRequest()
        self._is_training = False
        self._ranks_agree = False
        self._put_off: list[partial[None]] = []
        self._before_sampling: dict[str, Any] | None = None
        self.owns_resumed = False
        """True if the run goes on as the one whose checkpoint it resumes, and removes that one too in its turn."""
        self._on_disk: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lets one-file checkpoints be written where they are to be.

        Raises:
            SettingError: if there is a second one, which would take the signals from the first.
        """
        if sum(isinstance(callback, PolicyCheckpoint) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise SettingError(
                "`trainer.callbacks` has two `PolicyCheckpoint`s, and only one can answer Ctrl-C and SIGTERM; take "
                "lightning.pytorch.callbacks.ModelCheckpoint for a second rule of what is kept"
            )
        super().setup(trainer, pl_module, stage)
        strategy = trainer.strategy
        if (
            isinstance(strategy, SingleDeviceStrategy | DDPStrategy)
            and type(strategy.checkpoint_io) is TorchCheckpointIO
        ):
            strategy.checkpoint_io = StreamedCheckpointIO()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Takes Ctrl-C and SIGTERM over."""
        self._is_training = False
        self._listen(trainer)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Ends the run if that has been asked for; there is nothing to save yet."""
        self._end_if_asked(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes Ctrl-C and SIGTERM over."""
        super().on_train_start(trainer, pl_module)
        self._is_training, self._ranks_agree, self._put_off, self._before_sampling = True, False, [], None
        self._last_global_step_saved = trainer.global_step  # of a resumed run: that is where it comes from
        if self.owns_resumed:  # Lightning would begin another link
            self.last_model_path = self.format_checkpoint_name(
                self._monitor_candidates(trainer), self.CHECKPOINT_NAME_LAST
            )
        self._listen(trainer)

    def on_rollout_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Keeps what sampling changes, where it may be given up."""
        if self._is_training and trainer.world_size == 1:
            self._before_sampling = self._sampling_state(trainer)

    def on_rollout_end(self, *_: Any) -> None:  # noqa: ANN401
        """The rollout is made: a checkpoint is one of after it."""
        self._before_sampling = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps what sampling changes, where it may be given up."""
        self.on_rollout_start(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts off what `ModelCheckpoint` may save: the end of the epoch logs more at this step."""
        self._before_sampling = None
        if self._is_training:
            self._put_off.append(partial(super().on_validation_end, trainer, pl_module))

    def on_train_batch_end(self, *arguments: Any) -> None:  # noqa: ANN401
        """Puts off what `ModelCheckpoint` may save: the module has yet to log the update."""
        self._put_off.append(partial(super().on_train_batch_end, *arguments))

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        batch: Any,  # noqa: ANN401, ARG002
        batch_idx: int,
    ) -> None:
        """Saves what was put off; ends the run before an update if that has been asked for."""
        self._save_what_was_put_off()
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._end_if_asked(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves if it is time to; ends the run, before the next rollout, if that has been asked for."""
        self._save_what_was_put_off()
        super().on_train_epoch_end(trainer, pl_module)
        self._end_if_asked(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `ModelCheckpoint`. The run is at its end: Ctrl-C and SIGTERM have nothing to end any more."""
        self._is_training = False
        if not trainer.fast_dev_run:  # type: ignore[attr-defined] # where Lightning would still write `last.ckpt`
            super().on_train_end(trainer, pl_module)

    @property
    def is_run_to_end(self) -> bool:
        """True after Ctrl-C or SIGTERM, of this rank alone."""
        return self._end_request.signal is not None

    def on_wait_ended(self, trainer: Trainer) -> None:
        """Ends the run; on several ranks without a checkpoint, in the middle of what is sampled."""
        if self.save_on_exception:
            self._end_request.end_if_asked(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the signals back."""
        super().teardown(trainer, pl_module, stage)
        self._end_request.stop_listening()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves after Ctrl-C and SIGTERM, and after an exception on a run of one rank; not for want of room."""
        is_whole = (trainer.world_size == 1 and not why_no_room(exception)) or self._ranks_agree
        if not self._is_training or self._end_request.is_forced or not is_whole:
            return
        try:
            super().on_exception(trainer, pl_module, exception)
        except NonFiniteError as error:
            rank_zero_warn(str(error))
        if path := self._last_checkpoint_saved:
            rank_zero_info(f"The last checkpoint is {path}; the same command with `--ckpt_path last` goes on from it")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Adds how far the logs are; states of callbacks are those of before an interrupted sampling."""
        if self._before_sampling is None:
            checkpoint[LOGS] = self._log_positions(trainer)
        else:
            checkpoint[LOGS] = self._before_sampling[LOGS]
            checkpoint["callbacks"] |= self._before_sampling["callbacks"]

    def state_dict(self) -> dict[str, Any]:
        """See `ModelCheckpoint`; also the checkpoints that are on the disk, some of them to be removed by now."""
        return {**super().state_dict(), "on_disk": sorted(self._on_disk)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `ModelCheckpoint`."""
        super().load_state_dict(state_dict)
        self._on_disk = {path for path in state_dict["on_disk"] if os.path.dirname(path) == str(self.dirpath)}

    def _sampling_state(self, trainer: Trainer) -> dict[str, Any]:
        """The logs' positions, and states of the callbacks that change while completions are sampled and scored."""
        others: list[Callback] = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        states = {c.state_key: c.state_dict() for c in others if isinstance(c, Reward | RolloutHooks)}
        kept = copy.deepcopy({key: state for key, state in states.items() if state})
        return {LOGS: self._log_positions(trainer), "callbacks": kept}

    @staticmethod
    def _log_positions(trainer: Trainer) -> list[dict[str, Any]]:
        return log_positions(trainer.loggers) if trainer.is_global_zero else []

    def _save_what_was_put_off(self) -> None:
        put_off, self._put_off = self._put_off, []
        for save in put_off:
            save()

    def _listen(self, trainer: Trainer) -> None:
        if self.save_on_exception:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            self._end_request.listen(trainer, lambda: trainer.world_size == 1 and getattr(data, "is_sampling", False))

    def _end_if_asked(self, trainer: Trainer) -> None:
        if self.save_on_exception:
            self._ranks_agree = True
            self._end_request.end_if_asked(trainer)
            self._ranks_agree = False

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Saves where a kill leaves this checkpoint or the one before; see `ModelCheckpoint`."""
        module = trainer.lightning_module
        if isinstance(module, WeightSource) and not module.weights_are_finite():
            raise NonFiniteError(
                f"a weight of the policy is NaN or infinite after update {trainer.global_step}: no checkpoint is "
                "written, and those before stay. Go on from one of them with a lower learning rate"
            )
        self._on_disk.add(filepath)
        save_checkpoint(trainer, filepath, weights_only=self.save_weights_only)
        if self.owns_resumed and self.save_top_k != -1:
            self._remove_forgotten(trainer, filepath)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(weakref.proxy(self))

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._remove_checkpoint(trainer, filepath)
        self._on_disk.discard(filepath)

    def _remove_forgotten(self, trainer: Trainer, newest: str) -> None:
        """Removes what a killed run had no time to remove, and the checkpoint that this one was resumed from."""
        kept = {newest, self.best_model_path, self.kth_best_model_path, self.last_model_path, *self.best_k_models}
        for path in sorted(self._on_disk - kept):
            self._remove_checkpoint(trainer, path)
