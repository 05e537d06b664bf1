"""Where a run is in its prompts: passes, data sets, and what a curriculum leaves out."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from drpo_lightning.batch import Rollout
from drpo_lightning.datamodules import RolloutDataModule
from drpo_lightning.logs import log_metrics
from drpo_lightning.rollout.hooks import RolloutHooks


class PromptStatistics(Callback, RolloutHooks):
    """Logs every rollout, at the optimizer steps that were completed when it was sampled.

    `data/passes` (how often the data set has been gone through, skipped prompts included); where prompts are left out
    for their length, `data/overlong_prompts` (how many of the data set); with `MixedPrompts`, for each data set
    `data/<name>/fraction` (of the rollout's samples) and `data/<name>/reward_mean` (without dropped samples); with a
    curriculum `data/skipped_fraction` (of the prompts that the stream came to for this rollout), and of all prompts
    `data/too_easy_fraction`, `data/too_hard_fraction` (pass rate above or below the range) and
    `data/unjudged_fraction` (too few samples so far).
    """

    def __init__(self) -> None:
        self._metrics: dict[str, float] = {}

    def on_rollout_end(self, trainer: Trainer, pl_module: LightningModule, rollout: Rollout) -> None:
        """Takes the figures, over all ranks."""
        data: RolloutDataModule = trainer.datamodule  # type: ignore[attr-defined]
        assert data.schedule is not None
        self._metrics = data.schedule.metrics(data.iteration)
        if data.num_overlong_prompts:
            self._metrics["data/overlong_prompts"] = data.num_overlong_prompts
        names = sorted({row["data_set"] for row in data.schedule.rows if "data_set" in row})
        if names:
            self._metrics |= data_set_metrics(trainer, pl_module, rollout, names)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ANN401, ARG002
        """Logs the rollout that the first of its micro-batches comes from: the loader itself must not log."""
        if self._metrics:
            log_metrics(trainer, pl_module, self._metrics)
            self._metrics = {}


def data_set_metrics(
    trainer: Trainer, pl_module: LightningModule, rollout: Rollout, names: list[str]
) -> dict[str, float]:
    """Share and mean reward of each data set in a rollout. Collective over ranks.

    Args:
        trainer: the trainer.
        pl_module: the module.
        rollout: this rank's samples.
        names: of the data sets, the same on every rank.
    """
    of_samples = rollout.columns.get("data_set", [None] * len(rollout))
    sums = []
    for name in names:
        is_of_set = torch.tensor([of_sample == name for of_sample in of_samples])
        rewards = rollout.rewards[is_of_set & rollout.is_kept].double()
        sums.append([float(is_of_set.sum()), float(len(rewards)), float(rewards.sum())])
    packed = torch.tensor(sums, dtype=torch.float64, device=pl_module.device)
    totals: list[list[float]] = trainer.strategy.reduce(packed, reduce_op="sum").tolist()
    samples = sum(total[0] for total in totals)
    metrics = {}
    for name, (count, kept, reward) in zip(names, totals, strict=True):
        metrics[f"data/{name}/fraction"] = count / samples
        if kept:
            metrics[f"data/{name}/reward_mean"] = reward / kept
    return metrics
