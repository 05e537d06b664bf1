"""Base of the callbacks that watch every token of an optimizer update."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from drpo_lightning.batch import RolloutBatch
from drpo_lightning.callbacks.tensorboard import write_histogram
from drpo_lightning.logs import log_interval, log_metrics
from drpo_lightning.metrics import TokenStatistics
from drpo_lightning.modules.policy import StepOutput


class TokenValues(NamedTuple):
    """Per-token values of one micro-batch, `[batch, seq]` each.

    Attributes:
        values: by name.
        subsets: masks narrower than the completion mask, by name of the value they are for.
    """

    values: dict[str, Tensor]
    subsets: dict[str, Tensor]


class UpdateStatistics(Callback, ABC):
    """Gathers token statistics over the micro-batches and ranks of an optimizer update, and logs them after it.

    They are taken on the policy before the update: the first update of a rollout sees the weights that sampled it.

    Args:
        statistics: the metric to feed.
        every_n_updates: logs after every n-th optimizer step; by default as often as `trainer.log_every_n_steps`.
    """

    def __init__(self, statistics: TokenStatistics, every_n_updates: int | None = None) -> None:
        if every_n_updates is not None and every_n_updates < 1:
            raise ValueError(f"`every_n_updates` must be at least 1, got {every_n_updates}")
        self.statistics = statistics
        self.every_n_updates = every_n_updates
        self._logged_step = 0

    @abstractmethod
    def token_values(self, batch: RolloutBatch, outputs: StepOutput) -> TokenValues:
        """The values that the metric is fed with."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the states to the device of the policy."""
        self.statistics.to(pl_module.device)
        self._logged_step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's signature; a StepOutput
        batch: RolloutBatch,
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Adds the micro-batch; logs if it completed an optimizer update."""
        interval = self.every_n_updates or log_interval(trainer)
        # The update that this micro-batch belongs to, counted from 1, whether or not it is complete by now.
        is_complete = trainer.global_step != self._logged_step
        update = trainer.global_step if is_complete else trainer.global_step + 1
        if update % interval == 0:
            values, subsets = self.token_values(batch, outputs)
            self.statistics.update(values, batch.completion_mask, subsets)
        if not is_complete:
            return
        self._logged_step = trainer.global_step
        if update % interval == 0:
            scalars, histograms = self.statistics.compute()
            self.statistics.reset()
            log_metrics(trainer, pl_module, scalars)
            for name, histogram in histograms.items():
                write_histogram(trainer, name, histogram)
