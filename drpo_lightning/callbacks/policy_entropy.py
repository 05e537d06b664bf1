"""How undecided the policy is: the entropy of its distribution at every token of some completions."""

from typing import Any

import torch
from jaxtyping import Bool
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from drpo_lightning.batch import Rollout, RolloutBatch
from drpo_lightning.callbacks.sampled_completions import pass_size, spread_rows
from drpo_lightning.callbacks.tensorboard import write_histogram
from drpo_lightning.logs import log_metrics
from drpo_lightning.metrics import TokenStatistics, geometric_edges
from drpo_lightning.rollout.hooks import RolloutHooks

LARGEST = 16.0
"""Nats, above the entropy of any distribution over less than 8.9 million tokens."""


class PolicyEntropy(Callback, RolloutHooks):
    """Logs the entropy of pi, in nats, at the places of sampled tokens, over the whole vocabulary.

    `entropy/mean`, `entropy/p50`, `entropy/p90`, `entropy/p99` and `entropy/max` over completion tokens;
    `entropy/mean_first_quarter` and `entropy/mean_last_quarter` over the first and the last quarter of each completion;
    `histogram/entropy`. pi is at the temperature of the sampling, and has the weights that the updates on the rollout
    begin with. Logged at the optimizer steps completed by then.

    `entropy/rollout` of `PolicyShift` estimates the mean for nothing, by -log mu of all sampled tokens. One sample does
    not tell the entropy of a token: where the policy decides, and whether it still does, take the distributions.

    A quantile is off by less than 2.4 % of itself, or by less than 1e-4 nats.

    Args:
        num_sequences: completions of each rank that are computed, spread evenly over the rollout. By default one in 32,
            at least one. A forward pass of n completions costs about n / (3 N) of the updates on the N completions of a
            rank's rollout, 1 % by default.
        every_n_rollouts: does so for every n-th rollout, the first included.

    Raises:
        ValueError: if a setting is out of range.
    """

    def __init__(self, num_sequences: int | None = None, every_n_rollouts: int = 1) -> None:
        if num_sequences is not None and num_sequences < 1:
            raise ValueError(f"`num_sequences` must be at least 1, got {num_sequences}")
        if every_n_rollouts < 1:
            raise ValueError(f"`every_n_rollouts` must be at least 1, got {every_n_rollouts}")
        self.num_sequences = num_sequences
        self.every_n_rollouts = every_n_rollouts
        self.statistics = TokenStatistics(
            subset_means=["entropy/mean"],
            subsets=["_first_quarter", "_last_quarter"],
            maxima=["entropy/max"],
            quantiles={"entropy/": (geometric_edges(1e-4, LARGEST), [0.5, 0.9, 0.99])},
            histograms={"histogram/entropy": LARGEST * torch.linspace(0, 1, 81) ** 2},
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Moves the states to the device of the policy."""
        self.statistics.to(pl_module.device)

    def on_rollout_end(self, trainer: Trainer, pl_module: LightningModule, rollout: Rollout) -> None:
        """Computes the entropies. Collective under FSDP: every rank has as many completions.

        A forward pass is no larger than a micro-batch of the training.
        """
        if trainer.current_epoch % self.every_n_rollouts:
            return
        rows, size = spread_rows(rollout, self.num_sequences), pass_size(trainer, rollout)
        for start in range(0, len(rows), size):
            batch = RolloutBatch.collate(
                rollout,
                rows[start : start + size],
                None,
                pad_token_id=trainer.datamodule.encoder.pad_token_id,  # type: ignore[attr-defined]
                num_update_tokens=0,
                num_update_sequences=0,
            )
            self._add(trainer, pl_module, batch)

    def _add(self, trainer: Trainer, pl_module: LightningModule, batch: RolloutBatch) -> None:
        inputs = [x.to(pl_module.device) for x in (batch.input_ids, batch.attention_mask, batch.completion_mask)]
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            entropies = pl_module(*inputs, returns_entropy=True)
        mask = inputs[-1]
        values = dict.fromkeys(("entropy/mean", "entropy/max", "entropy/", "histogram/entropy"), entropies[mask])
        first, last = outer_quarters(mask)
        self.statistics.update(values, {"_first_quarter": first[mask], "_last_quarter": last[mask]})

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ANN401, ARG002
        """Logs before the first update on the rollout: the loader itself must not log."""
        if not self.statistics.update_called:
            return
        scalars, histograms = self.statistics.compute()
        self.statistics.reset()
        log_metrics(trainer, pl_module, scalars)
        for name, histogram in histograms.items():
            write_histogram(trainer, name, histogram)


def outer_quarters(
    completion_mask: Bool[Tensor, "batch seq"],
) -> tuple[Bool[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
    """The first and the last quarter of each completion, rounded up: the one token of the shortest is in both."""
    number = completion_mask.cumsum(1)
    length = number[:, -1:]
    return completion_mask & (4 * (number - 1) < length), completion_mask & (4 * (length - number) < length)
