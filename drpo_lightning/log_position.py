"""How far the logs were written when a checkpoint was saved, and how a resumed run goes on from there.

A killed run may have logged more than its last checkpoint knows of; the resumed run logs it again. Steps do not tell
the one from the other, since what stands at one step is logged before and after a checkpoint: the files are cut to
what they held.
"""

import csv
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
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


def cut_logs(loggers: Sequence[Logger], positions: Sequence[Position]) -> None:
    """Lets loggers whose folders are taken go on from the place that positions speak of; before they are used."""
    for logger, position in _pairs(loggers, positions):
        _cut(logger, position["files"])


def _pairs(
    loggers: Sequence[Logger], positions: Sequence[Position]
) -> Iterator[tuple[TensorBoardLogger | CSVLogger, Position]]:
    for logger, position in zip(loggers, positions, strict=False):
        if position and isinstance(logger, TensorBoardLogger | CSVLogger):
            yield logger, position


@rank_zero_only
def _cut(logger: TensorBoardLogger | CSVLogger, files: Mapping[str, int]) -> None:
    folder = Path(logger.log_dir)
    for path in folder.glob(EVENTS):
        if path.name not in files:
            path.unlink()
        elif path.stat().st_size > files[path.name]:
            os.truncate(path, files[path.name])
    if isinstance(logger, CSVLogger):
        _reopen(logger, folder, files.get(METRICS, 0))


def _reopen(logger: CSVLogger, folder: Path, num_rows: int) -> None:
    """Opens a CSV logger on the first rows of the file that it has written, which it would remove otherwise."""
    metrics, kept = folder / METRICS, folder / KEPT
    if metrics.is_file() and not kept.is_file():
        metrics.replace(kept)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*exists and is not empty")
        writer = logger.experiment
    if not kept.is_file():
        return
    names, rows = _rows(kept)
    if len(rows) < num_rows:
        rank_zero_warn(f"{str(metrics)!r} has lost {num_rows - len(rows)} of {num_rows} rows: the run was killed in it")
    with whole_file(metrics) as cut, cut.open("w", newline="") as file:
        table = csv.DictWriter(file, fieldnames=names)
        table.writeheader()
        table.writerows(rows[:num_rows])
    kept.unlink()
    writer.metrics_keys = names


def _rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Column names and rows of a CSV file."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        return list(reader.fieldnames or []), rows
