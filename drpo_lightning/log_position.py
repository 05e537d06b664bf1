"""How far the logs were written when a checkpoint was saved, and how a resumed run goes on from there.

A killed run may have logged more than its last checkpoint knows of; the resumed run logs it again. Steps do not tell
the one from the other, since what stands at one step is logged before and after a checkpoint: the files are cut to
what they held.
"""

import csv
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn

from drpo_lightning.disk import told_if_full, whole_file

EVENTS = "events.out.tfevents.*"
METRICS = "metrics.csv"
KEPT = "metrics.csv.kept"
"""What `metrics.csv` was, for as long as Lightning's logger removes or rewrites it."""

Position = dict[str, Any]
"""Of one logger: its `version`, and the length of its files by name: bytes of events, rows of `metrics.csv`."""


def log_positions(loggers: Sequence[Logger]) -> list[Position]:
    """Writes out what loggers still hold; how far each of them is. For TensorBoard and CSV; empty for others.

    Args:
        loggers: those of the trainer, on rank 0.
    """
    return [_position(logger) for logger in loggers]


def _position(logger: Logger) -> Position:
    if not isinstance(logger, TensorBoardLogger | CSVLogger):
        return {}
    folder = Path(logger.log_dir)
    with told_if_full(_log_file(logger, folder)):
        _save(logger, folder)
    files = {path.name: path.stat().st_size for path in folder.glob(EVENTS)}
    if (folder / METRICS).is_file():
        files[METRICS] = len(_rows(folder / METRICS)[1])
    return {"version": logger.version, "files": files}


def _log_file(logger: TensorBoardLogger | CSVLogger, folder: Path) -> Path:
    """What the logger writes to; its folder before it has begun."""
    if isinstance(logger, CSVLogger):
        return folder / METRICS
    return max(folder.glob(EVENTS), default=folder)


def _save(logger: TensorBoardLogger | CSVLogger, folder: Path) -> None:
    """Writes out. For a new column Lightning writes the table anew: what it held is kept until that is done."""
    table = folder / METRICS
    is_rewritten = isinstance(logger, CSVLogger) and table.is_file() and _new_columns(logger)
    if is_rewritten:
        with whole_file(folder / KEPT) as kept:
            shutil.copyfile(table, kept)
    logger.save()
    if is_rewritten:
        (folder / KEPT).unlink()


def _new_columns(logger: CSVLogger) -> set[str]:
    """Names of what is to be written and has no column yet."""
    writer = logger.experiment
    return set().union(*writer.metrics) - set(writer.metrics_keys)


def take_folders(loggers: Sequence[Logger], positions: Sequence[Position]) -> None:
    """Lets loggers go on in the folders that positions speak of; before they are used.

    Args:
        loggers: as configured for the run that was saved.
        positions: theirs, in the same order; an empty one leaves its logger to begin a new folder.
    """
    for logger, position in _pairs(loggers, positions):
        logger._version = position["version"]  # Lightning has no other way to set it on a logger that exists


def reopen_logs(loggers: Sequence[Logger], positions: Sequence[Position]) -> Callable[[], None]:
    """Opens loggers whose folders are taken on the files that are there; before they are used.

    Returns:
        What cuts these files to the place that positions speak of, once the run goes on from there.
    """
    return partial(_call_all, [_reopen(*pair) for pair in _pairs(loggers, positions)])


def _call_all(functions: Sequence[Callable[[], None]]) -> None:
    for function in functions:
        function()


def _pairs(
    loggers: Sequence[Logger], positions: Sequence[Position]
) -> Iterator[tuple[TensorBoardLogger | CSVLogger, Position]]:
    for logger, position in zip(loggers, positions, strict=False):
        if position and isinstance(logger, TensorBoardLogger | CSVLogger):
            yield logger, position


def _reopen(logger: TensorBoardLogger | CSVLogger, position: Position) -> Callable[[], None]:
    folder = Path(logger.log_dir)
    if isinstance(logger, CSVLogger):
        _reopen_table(logger, folder)
    return partial(_cut, folder, list(folder.glob(EVENTS)), position["files"])


@rank_zero_only
def _reopen_table(logger: CSVLogger, folder: Path) -> None:
    """Opens a CSV logger on the file that it has written, which it would remove otherwise."""
    metrics, kept = folder / METRICS, folder / KEPT
    if metrics.is_file() and not kept.is_file():
        metrics.replace(kept)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*exists and is not empty")
        writer = logger.experiment
    if kept.is_file():
        kept.replace(metrics)
        writer.metrics_keys, _ = _rows(metrics)


@rank_zero_only
def _cut(folder: Path, events: Sequence[Path], lengths: Mapping[str, int]) -> None:
    """Cuts what was there before the loggers were opened again."""
    for path in events:
        if path.name not in lengths:
            path.unlink()
        elif path.stat().st_size > lengths[path.name]:
            os.truncate(path, lengths[path.name])
    if (folder / METRICS).is_file():
        _cut_table(folder / METRICS, lengths.get(METRICS, 0))


def _cut_table(metrics: Path, num_rows: int) -> None:
    names, rows = _rows(metrics)
    if len(rows) < num_rows:
        rank_zero_warn(f"{str(metrics)!r} has lost {num_rows - len(rows)} of {num_rows} rows: the run was killed in it")
    with whole_file(metrics) as cut, cut.open("w", newline="") as file:
        table = csv.DictWriter(file, fieldnames=names)
        table.writeheader()
        table.writerows(rows[:num_rows])


def _rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Column names and rows of a CSV file."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        return list(reader.fieldnames or []), rows
