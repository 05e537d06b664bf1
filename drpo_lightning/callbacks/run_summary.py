"""What a run came to, in a few lines at its end."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from drpo_lightning.callbacks.export_policy import ExportPolicy


class RunSummary(Callback):
    """Prints the validation before and after, and where the logs and the exported policy are.

    The validation before is Lightning's sanity check: set `trainer.num_sanity_val_steps: -1`. Without it, the first
    and the latest validation are compared, and a single one stands alone.
    """

    def __init__(self) -> None:
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._first_step = 0
        self._last_step = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Keeps the first and the latest figures."""
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        if not self._first:
            self._first, self._first_step = metrics, trainer.global_step
        self._last, self._last_step = metrics, trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """The first and the latest figures, which a resumed run prints too."""
        return {"first": self._first, "last": self._last, "first_step": self._first_step, "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the figures of the run so far over."""
        self._first, self._first_step = state_dict["first"], state_dict["first_step"]
        self._last, self._last_step = state_dict["last"], state_dict["last_step"]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Prints the summary on rank 0."""
        log_dir = trainer.log_dir  # collective
        if not trainer.is_global_zero:
            return
        exported = [c.exported for c in trainer.callbacks if isinstance(c, ExportPolicy) and c.exported]  # type: ignore[attr-defined]
        lines = [f"{trainer.global_step} updates on {trainer.current_epoch} rollouts"]
        for label, key in (("reward", "val/reward/mean"), ("pass@1", "val/pass@1")):
            if key in self._last:
                figures = {self._first_step: self._first[key], self._last_step: self._last[key]}
                parts = [f"{value:.3f} {_moment(step, trainer.global_step)}" for step, value in figures.items()]
                lines.append(f"held-out {label}: {' -> '.join(parts)}")
        if log_dir:
            lines.append(f"logs:    {log_dir}")
        lines += [f"policy:  {folder}" for folder in exported]
        if log_dir:
            lines.append(f"look at: tensorboard --logdir '{Path(log_dir).parent}'")
        print("\n" + "\n".join(lines), flush=True)  # noqa: T201


def _moment(step: int, last_step: int) -> str:
    """When a validation was, in words."""
    if step == last_step:
        return "after"
    return f"after {step} updates" if step else "before"
