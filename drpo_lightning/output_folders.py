"""The folders that a run writes to: checked before anything heavy starts, and its own for as long as it lasts."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning_utilities.core.rank_zero import rank_zero_only, rank_zero_warn

from drpo_lightning.callbacks import ExportPolicy, TokenExport
from drpo_lightning.disk import DiskFullError, check_writable, named_failure, why_no_room, why_no_room_at
from drpo_lightning.errors import SettingError
from drpo_lightning.folder_lock import FolderInUseError, locked

LEFT_BY_A_START = ("events.out.tfevents.*", "hparams.yaml", "config.yaml")
"""What Lightning writes before a setting may be refused."""


class Output(NamedTuple):
    """A folder that is written to.

    Attributes:
        setting: what says so.
        folder: the folder.
    """

    setting: str
    folder: Path


@rank_zero_only
def claim_output_folders(trainer: Trainer, held: ExitStack) -> None:
    """Checks the folders for logs, checkpoints and exports, and keeps other runs out of them. For rank 0.

    A logger of TensorBoard's or CSV that is to choose its version gets a new folder, whoever else looks for one.

    Args:
        trainer: before its run has begun; the versions of loggers that go on are set.
        held: gives the folders back when it is closed, and names the one that is full after an error that does not.

    Raises:
        SettingError: if a folder cannot be written to, another run writes there, or the first logger has none.
    """
    if not trainer.fast_dev_run:  # type: ignore[attr-defined] # which writes nothing
        _check_first_logger(trainer)
        _claim([*_configured_outputs(trainer), *_log_outputs(trainer, held)], held)


@rank_zero_only
def claim_log_folders(trainer: Trainer, held: ExitStack) -> None:
    """As `claim_output_folders`, for the folders of loggers alone."""
    _claim(_log_outputs(trainer, held), held)


def _check_first_logger(trainer: Trainer) -> None:
    """Where the configuration, checkpoints and samples go."""
    first = next(iter(trainer.loggers), None)
    if first is not None and not isinstance(first, TensorBoardLogger | CSVLogger) and first.save_dir is None:
        raise SettingError(
            f"`trainer.logger`: {type(first).__name__} has no folder for the configuration, checkpoints and samples; "
            "list TensorBoardLogger before it, see docs/logging.md"
        )


def _configured_outputs(trainer: Trainer) -> Iterator[Output]:
    """Folders that do not lie in that of a logger."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        if isinstance(callback, ModelCheckpoint) and callback.dirpath and "://" not in str(callback.dirpath):
            yield Output(f"`dirpath` of {name}", Path(callback.dirpath))
        if isinstance(callback, ExportPolicy | TokenExport) and callback.folder is not None:
            yield Output(f"`folder` of {name}", Path(callback.folder).expanduser())
    if not trainer.loggers:
        yield Output("`trainer.default_root_dir`", Path(trainer.default_root_dir))


def _log_outputs(trainer: Trainer, held: ExitStack) -> Iterator[Output]:
    """Folders of loggers; those that are to choose a version have one then."""
    for logger in trainer.loggers:
        if not isinstance(logger, TensorBoardLogger | CSVLogger):
            continue
        setting = f"`save_dir` of {type(logger).__name__}"
        if logger._version is None:
            _choose_version(logger, setting, held)
        yield Output(setting, Path(logger.log_dir))


def _choose_version(logger: TensorBoardLogger | CSVLogger, setting: str, held: ExitStack) -> None:
    """Makes the logger's folder, of a version that no other run has chosen."""
    check_writable(Path(logger.root_dir), setting)
    while True:
        folder = Path(logger.log_dir)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if not folder.is_dir():
                raise SettingError(f"{setting}: {str(folder)!r} is a file; move it away") from None
            logger._version = None  # Lightning has no other way to let it choose again
        else:
            held.push(partial(_remove_if_refused, folder))
            return


def _remove_if_refused(folder: Path, failure: type[BaseException] | None, *_: Any) -> None:  # noqa: ANN401
    """Removes what a run that was refused at its start has left: a folder with nothing of a run in it."""
    left = {path for pattern in LEFT_BY_A_START for path in folder.glob(pattern)}
    if failure is not None and issubclass(failure, SettingError) and left == set(folder.iterdir()):
        for path in left:
            path.unlink()
    _remove_if_empty(folder)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _claim(outputs: Iterable[Output], held: ExitStack) -> None:
    distinct = {output.folder.resolve(): output.setting for output in outputs}
    for folder, setting in distinct.items():
        is_new = not folder.exists()
        check_writable(folder, setting)
        try:
            held.enter_context(locked(folder))
            if is_new:
                held.callback(_remove_if_empty, folder)
        except FolderInUseError as error:
            raise SettingError(
                f"{setting} {str(folder)!r}: another run is writing there. Wait for its end, or end it; a run beside "
                "it needs a folder of its own"
            ) from error
        except OSError as error:
            rank_zero_warn(f"{str(folder)!r} cannot be locked ({error.strerror}): let no other run write there")
    held.enter_context(_told_where_it_is_full(distinct))


@contextmanager
def _told_where_it_is_full(folders: Iterable[Path]) -> Iterator[None]:
    """Names the folders without room after an error that says no more than that there is none."""
    try:
        yield
    except Exception as error:
        if named := named_failure(error):
            raise DiskFullError(str(named)) from error
        reason = why_no_room(error)
        full = [str(folder) for folder in folders if reason and why_no_room_at(folder)]
        if not full:
            raise
        raise DiskFullError(
            f"a file in {' and '.join(map(repr, full))} could not be written: {reason}. The last checkpoint stays: "
            "make room, and go on with `--ckpt_path last`"
        ) from error
