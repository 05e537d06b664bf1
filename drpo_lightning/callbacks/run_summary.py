"""What a run came to, in a few lines at its end."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from drpo_lightning.callbacks.export_policy import ExportPolicy


class RunSummary(Callback):
    """Prints the validation before and after, and where the logs and the exported policy are.

    The validation before is Lightning's sanity check: set `trainer.num_sanity_val_steps: -1`.
    """

    def __init__(self) -> None:
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._last_step = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Keeps the first and the latest figures."""
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        self._first = self._first or metrics
        self._last, self._last_step = metrics, trainer.global_step

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Prints the summary on rank 0."""
        log_dir = trainer.log_dir  # collective
        if not trainer.is_global_zero:
            return
        exported = [c.exported for c in trainer.callbacks if isinstance(c, ExportPolicy) and c.exported]  # type: ignore[attr-defined]
        lines = [f"{trainer.global_step} updates on {trainer.current_epoch} rollouts"]
        for label, key in (("reward", "val/reward/mean"), ("pass@1", "val/pass@1")):
            if key in self._last:
                when = "after" if self._last_step == trainer.global_step else f"after {self._last_step} updates"
                lines.append(f"held-out {label}: {self._first[key]:.3f} before -> {self._last[key]:.3f} {when}")
        if log_dir:
            lines.append(f"logs:    {log_dir}")
        lines += [f"policy:  {folder}" for folder in exported]
        if log_dir:
            lines.append(f"look at: tensorboard --logdir '{Path(log_dir).parent}'")
        print("\n" + "\n".join(lines), flush=True)  # noqa: T201
