"""Some completions of a rollout that a callback has the policy compute beside the training."""

from lightning.pytorch import Trainer

from drpo_lightning.batch import Rollout

ONE_IN = 32
"""Of how many completions one is computed by default."""


def spread_rows(rollout: Rollout, number: int | None) -> list[int]:
    """Rows of completions, spread evenly over a rollout.

    Args:
        rollout: this rank's.
        number: how many, at most all; by default one in 32, and at least one.
    """
    asked = max(1, len(rollout) // ONE_IN) if number is None else number
    taken = min(asked, len(rollout))
    return [i * len(rollout) // taken for i in range(taken)]


def pass_size(trainer: Trainer, rollout: Rollout) -> int:
    """Completions of a forward pass that is no larger than a micro-batch of the training.

    Args:
        trainer: with a `RolloutDataModule`.
        rollout: this rank's.
    """
    num_updates: int = trainer.datamodule.num_updates  # type: ignore[attr-defined]
    return max(1, len(rollout) // (num_updates * int(trainer.accumulate_grad_batches)))
