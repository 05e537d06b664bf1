"""A run on the console: a line for every rollout, and on a terminal a bar that says which phase it is in."""

import math
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from drpo_lightning.batch import Rollout
from drpo_lightning.console import console, figure, print_table
from drpo_lightning.rollout.hooks import RolloutHooks


class Column(NamedTuple):
    """A column of the table: its title, and the metric that it shows."""

    title: str
    metric: str


COLUMNS = (
    Column("reward", "reward/mean"),
    Column("|pi-mu|", "policy_shift/abs_mean"),
    Column("outside", "region/outside_fraction"),
    Column("w<0", "grad_weight/corrective_fraction"),
    Column("masked", "mask/fraction"),
    Column("KL", "divergence/k3_kl"),
    Column("mismatch", "mismatch/k3_kl"),
    Column("tokens", "completions/mean_length"),
    Column("cut", "completions/truncated_fraction"),
    Column("tok/s", "perf/tokens_per_second"),
    Column("s", "perf/iteration_seconds"),
)
"""Those whose metric is not logged are left out."""
WIDTH = 8
LINES_PER_HEADER = 25


class RolloutProgress(ProgressBar, RolloutHooks):
    """Prints a line per rollout, and on a terminal shows the rollout in hand and its phase below them.

    A line has the mean reward, |pi - mu|, the share of tokens outside the region and of those with a negative gradient
    weight (or masked), KL(mu || pi) and the mismatch of the engines in nats, tokens per completion, the share that was
    cut off, sampled tokens per second and the seconds of the iteration, as far as callbacks log them. What is measured
    at updates is that of the rollout's last one.

    Args:
        every_n_rollouts: prints the line of every n-th rollout, the first included; 0 for none.
        verbose: prints every metric of these rollouts instead, as a table.
    """

    def __init__(self, every_n_rollouts: int = 1, verbose: bool = False) -> None:
        super().__init__()
        if every_n_rollouts < 0:
            raise ValueError(f"`every_n_rollouts` must be 0 or positive, got {every_n_rollouts}")
        self.every_n_rollouts = every_n_rollouts
        self.verbose = verbose
        self._is_enabled = True
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._num_lines = 0
        self._number = 0
        self._shown: tuple[Column, ...] = ()

    def disable(self) -> None:
        """Shows nothing from now on."""
        self._is_enabled = False

    def enable(self) -> None:
        """Shows everything again."""
        self._is_enabled = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Shows nothing on ranks other than 0."""
        super().setup(trainer, pl_module, stage)
        if not trainer.is_global_zero:
            self.disable()

    def print(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Prints above the bar."""
        if self._is_enabled:
            print(*args, **kwargs, flush=True)  # noqa: T201 - rich puts it above a bar of its own

    # ---------------------------------------------------------------- the bar

    @property
    def phase(self) -> str:
        """What the bar says; empty where there is none."""
        if self._progress is None or self._task is None:
            return ""
        return self._progress.tasks[0].description

    def _show(self, trainer: Trainer, phase: str, total: int | None, done: int = 0) -> None:
        """Starts the bar if there is none, and says what is going on."""
        if not self._is_enabled:
            return
        if self._progress is None:
            terminal = console()
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=terminal,
                refresh_per_second=4,
                disable=not terminal.is_terminal,
                transient=True,
            )
            self._task = self._progress.add_task("")
            self._progress.start()
        rollouts = trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else "?"
        where = "" if trainer.state.fn != "fit" else f"Rollout {trainer.current_epoch + 1}/{rollouts}, "
        assert self._task is not None
        self._progress.reset(self._task, description=f"{where}{phase}", total=total, completed=done)

    def _end(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """A validation begins."""
        self._show(trainer, "validating", None)

    def on_rollout_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """A rollout begins."""
        self._show(trainer, "sampling", None)

    def on_rollout_end(self, trainer: Trainer, pl_module: LightningModule, rollout: Rollout) -> None:  # noqa: ARG002
        """The updates begin."""
        self._show(trainer, "updating", int(self.total_train_batches))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ANN401, ARG002
        """Goes on after a validation, or in the middle of a rollout that was resumed."""
        if "updating" not in self.phase:
            self._show(trainer, "updating", int(self.total_train_batches), batch_idx)

    def on_train_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ANN401, ARG002
        batch: Any,  # noqa: ANN401, ARG002
        batch_idx: int,
    ) -> None:
        """A micro-batch is done."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=batch_idx + 1)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Takes the bar away."""
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Takes the bar away, and prints the line of the rollout that was the last."""
        self._end()
        self._print_line(trainer)

    # ---------------------------------------------------------------- the lines

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Notes which rollout it was: its line waits for what other callbacks log at this moment."""
        self._number = trainer.current_epoch + 1

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Prints the line of the rollout before."""
        self._print_line(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Prints the line of the last rollout."""
        self._print_line(trainer)

    def _print_line(self, trainer: Trainer) -> None:
        number, self._number = self._number, 0
        if not number or not self.every_n_rollouts or (number - 1) % self.every_n_rollouts:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if self.verbose:
            if self._is_enabled:
                rows = [[name, figure(value)] for name, value in sorted(metrics.items())]
                print_table(f"Rollout {number}, {trainer.global_step} updates", ["", "value"], rows)
            return
        shown = tuple(column for column in COLUMNS if column.metric in metrics)
        if shown != self._shown or self._num_lines % LINES_PER_HEADER == 0:
            self.print(" ".join(f"{title:>{WIDTH}}" for title in ("rollout", "updates", *(c.title for c in shown))))
            self._shown = shown
        cells = (str(number), str(trainer.global_step), *(_cell(metrics[column.metric]) for column in shown))
        self.print(" ".join(f"{cell:>{WIDTH}}" for cell in cells))
        self._num_lines += 1


def _cell(value: float) -> str:
    """A number in at most eight characters."""
    return "nan" if math.isnan(value) else figure(value).replace("e-0", "e-").replace("e+0", "e+")
