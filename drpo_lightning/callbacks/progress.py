"""A progress bar that says which phase a run is in."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from drpo_lightning.batch import Rollout
from drpo_lightning.rollout.hooks import RolloutHooks


class RolloutProgress(TQDMProgressBar, RolloutHooks):
    """Shows rollouts and updates, with the mean reward and sampled tokens per second.

    Args:
        refresh_rate: micro-batches between two refreshes.
        leave: whether the bar of a finished rollout stays on the screen.
    """

    def __init__(self, refresh_rate: int = 1, leave: bool = False) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)

    def _describe(self, trainer: Trainer, phase: str) -> None:
        if self.is_enabled and self._train_progress_bar is not None:
            rollouts = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else "?"
            self.train_progress_bar.set_description(f"Rollout {trainer.current_epoch + 1}/{rollouts}, {phase}")

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:  # noqa: ANN401
        """A rollout begins."""
        super().on_train_epoch_start(trainer)
        self._describe(trainer, "sampling")

    def on_rollout_end(self, trainer: Trainer, pl_module: LightningModule, rollout: Rollout) -> None:  # noqa: ARG002
        """The updates begin."""
        self._describe(trainer, "updating")

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Reward and speed beside Lightning's own."""
        metrics = dict(super().get_metrics(trainer, pl_module))
        metrics.pop("v_num", None)
        for label, key in (("reward", "reward/mean"), ("tok/s", "perf/tokens_per_second")):
            if key in trainer.callback_metrics:
                metrics[label] = float(trainer.callback_metrics[key])
        return metrics
