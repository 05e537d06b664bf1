"""Moments of a rollout that a Lightning callback can attend to."""

from typing import TYPE_CHECKING

from drpo_lightning.batch import Rollout

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from drpo_lightning.rollout.engine import RolloutEngine


class RolloutHooks:
    """A callback that also inherits from this class is called around rollouts.

    The rollout data module calls the members of `trainer.callbacks` that are `RolloutHooks`, on every rank.
    """

    @property
    def is_run_to_end(self) -> bool:
        """True once the run has been asked to end: an engine that waits for its servers then stops waiting."""
        return False

    def on_wait_ended(self, trainer: "Trainer") -> None:
        """Called when the engine has stopped waiting, to raise what the run is to end with."""

    def on_engine_refresh(self, trainer: "Trainer", pl_module: "LightningModule", engine: "RolloutEngine") -> None:
        """Called when the engine has got the trainer's weights, before it generates with them."""

    def on_rollout_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Called before the weights are synchronised and completions are sampled."""

    def on_rollout_end(self, trainer: "Trainer", pl_module: "LightningModule", rollout: Rollout) -> None:
        """Called with this rank's scored completions, before the first update on them."""


def rollout_hooks(trainer: "Trainer") -> list[RolloutHooks]:
    """The members of `trainer.callbacks` that are `RolloutHooks`."""
    return [callback for callback in trainer.callbacks if isinstance(callback, RolloutHooks)]  # type: ignore[attr-defined]
