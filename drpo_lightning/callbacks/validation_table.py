"""The validation as a table, on the console and in TensorBoard."""

from collections.abc import Mapping

from lightning.pytorch import Callback, LightningModule, Trainer

from drpo_lightning.callbacks.tensorboard import markdown_cell, markdown_table, tensorboard_writers
from drpo_lightning.console import figure, print_table
from drpo_lightning.logs import updates_completed

ALL = "all"
MAX_CHARACTERS = 100
TITLES = {
    "reward/mean": "reward",
    "completions/mean_length": "tokens",
    "completions/truncated_fraction": "truncated",
    "reward/dropped_fraction": "dropped",
}
"""Columns after avg@n, pass@k and maj@k."""


class ValidationTable(Callback):
    """Shows every validation as a table: a line for all prompts, and one per data set and category.

    The columns are avg@n (the share of the n samples of each prompt that passed), pass@k, maj@k (whether the answer
    that most of k samples give is right), reward, tokens per completion and the share that was cut off. The table is
    printed, and is in TensorBoard's text tab under `validation`. The subsets are what the data set's columns
    `data_set` and `category` say.

    Args:
        max_rows: subsets on the console; TensorBoard has them all.
    """

    def __init__(self, max_rows: int = 40) -> None:
        if max_rows < 1:
            raise ValueError(f"`max_rows` must be at least 1, got {max_rows}")
        self.max_rows = max_rows

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shows the table on rank 0."""
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if not trainer.is_global_zero or not datamodule.num_val_prompts:
            return
        sizes = {ALL: datamodule.num_val_prompts} | {name: len(rows) for name, rows in datamodule.val_subsets.items()}
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        header, rows = validation_table(sizes, metrics)
        left_out = len(rows) - self.max_rows - 1
        updates = updates_completed(trainer, pl_module)
        is_known = updates > 0 or trainer.state.fn == "fit"  # a folder that is validated may be that of a trained model
        title = "Held-out prompts" + (f" after {updates} updates" if is_known else "")
        print_table(
            title + (f" ({left_out} subsets left out)" if left_out > 0 else ""), header, rows[: self.max_rows + 1]
        )
        for writer in tensorboard_writers(trainer):
            cells = [[markdown_cell(cell, MAX_CHARACTERS) for cell in row] for row in rows]
            writer.add_text("validation", markdown_table(header, cells), updates)


def validation_table(sizes: Mapping[str, int], metrics: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table.

    Args:
        sizes: prompts of each row by name; `ALL` for all of them.
        metrics: logged values, `val/...` and `val/<row>/...`.
    """
    prefixes = {name: "val/" if name == ALL else f"val/{name}/" for name in sizes}
    at_k = sorted(
        {key.removeprefix(prefix) for prefix in prefixes.values() for key in metrics if _is_at_k(key, prefix)},
        key=lambda name: (("avg", "pass", "maj").index(name.partition("@")[0]), int(name.partition("@")[2])),
    )
    columns = {name: name for name in at_k} | {
        key: title for key, title in TITLES.items() if any(prefix + key in metrics for prefix in prefixes.values())
    }
    rows = [
        [name, str(sizes[name]), *(figure(metrics.get(prefix + key)) for key in columns)]
        for name, prefix in prefixes.items()
    ]
    return ["", "prompts", *columns.values()], rows


def _is_at_k(key: str, prefix: str) -> bool:
    name, _, k = key.removeprefix(prefix).partition("@")
    return key.startswith(prefix) and name in ("avg", "pass", "maj") and k.isdigit()
