"""The layout of TensorBoard's custom scalars: charts that belong together, side by side."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from drpo_lightning.callbacks.tensorboard import tensorboard_writers
from drpo_lightning.charts import Layout, charts_with


class Dashboard(Callback):
    """Groups the scalars of a run into a dashboard: TensorBoard's tab "Custom Scalars".

    The charts are those of `drpo_lightning.charts.LAYOUT` that have a scalar: the layout is written again whenever a
    chart has got its first one, and TensorBoard shows the latest.
    """

    def __init__(self) -> None:
        self._tags: set[str] = set()
        self._layout: Layout = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Starts with an empty dashboard."""
        self._tags, self._layout = set(), {}

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:  # noqa: ANN401
        """Adds the charts of a rollout and of an update."""
        self._add_charts(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Adds the charts of a validation, of which the one before the first update may be the only one."""
        self._add_charts(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Adds the charts of scalars that came after the last update."""
        self._add_charts(trainer)

    def _add_charts(self, trainer: Trainer) -> None:
        # On every rank: reading the metrics may be collective.
        new = trainer.callback_metrics.keys() - self._tags
        if not new:
            return
        self._tags |= new
        layout = charts_with(self._tags)
        if layout == self._layout:
            return
        self._layout = layout
        for writer in tensorboard_writers(trainer):
            writer.add_custom_scalars(
                {
                    section: {title: ["Multiline", [f"^(?:{pattern})$"]] for title, pattern in charts.items()}
                    for section, charts in layout.items()
                }
            )
