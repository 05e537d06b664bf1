"""Output that is whole or not there, and disks without room, told by the name of the file."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from drpo_lightning.errors import SettingError

NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "files may not become so large here (see `ulimit -f`)",
}
NUMBER_IN_TEXT = re.compile(r"(?:Errno |os error )(\d+)")
ERRORS_OF_TEXT = ("SafetensorError", "CheckpointException")
"""Errors that say only in their text what the system has said."""
PROBE_BYTES = 2**20
UNFINISHED = ".unfinished"


class DiskFullError(OSError):
    """There is no room for a file; the message names it, and says how to go on."""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that have led to it, each once: one that is raised again may have led to itself."""
    seen: list[BaseException] = []
    while error is not None and all(error is not other for other in seen):
        yield error
        seen.append(error)
        error = error.__cause__ or error.__context__


def named_failure(error: BaseException) -> DiskFullError | None:
    """The error that names a file without room, if it is this one or has led to it."""
    return next((link for link in _chain(error) if isinstance(link, DiskFullError)), None)


def why_no_room(error: BaseException) -> str | None:
    """What an error, or one that has led to it, says of a disk without room, in words; None if nothing."""
    if named := named_failure(error):
        return str(named)
    return next((NO_ROOM[number] for number in map(_number, _chain(error)) if number in NO_ROOM), None)


def _number(error: BaseException) -> int | None:
    """The system's number of an error."""
    if type(error).__name__ in ERRORS_OF_TEXT and (match := NUMBER_IN_TEXT.search(str(error))):
        return int(match[1])
    return error.errno if isinstance(error, OSError) else None


def why_no_room_at(path: Path) -> str | None:
    """Why a file cannot be appended to, or a folder take another one; None if it can.

    For errors that do not say why, as PyTorch's: the file is one that could not be completed.
    """
    try:
        with path.open("ab") if path.is_file() else tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(PROBE_BYTES))
    except OSError as error:
        return NO_ROOM.get(error.errno or 0)
    return None


@contextmanager
def told_if_full(path: str | Path) -> Iterator[None]:
    """Turns the failure of a block that writes a file, or a folder, into one that names it.

    Raises:
        DiskFullError: if there is no room.
    """
    try:
        yield
    except Exception as error:
        reason = why_no_room(error)
        if reason is None or named_failure(error):
            raise
        raise DiskFullError(f"{str(path)!r} could not be written: {reason}. Make room, and try again") from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a block another name to write to, which becomes `path` when the block is through.

    Raises:
        DiskFullError: if there is no room; nothing is left then, and a file that was there stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}{UNFINISHED}")
    try:
        with told_if_full(path):
            yield unfinished
            unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """Gives a block a folder inside of `folder`, out of which all files are moved when the block is through.

    Raises:
        DiskFullError: if there is no room; nothing is left then, and files that were there stay.
    """
    unfinished = folder / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    unfinished.mkdir(parents=True)
    try:
        with told_if_full(folder):
            yield unfinished
            for path in sorted(unfinished.rglob("*")):
                if path.is_file():
                    target = folder / path.relative_to(unfinished)
                    target.parent.mkdir(exist_ok=True)
                    path.replace(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_writable(folder: Path, setting: str) -> None:
    """Makes a folder if there is none, and writes into it.

    Args:
        folder: for output.
        setting: what says so, for the message.

    Raises:
        SettingError: if it is a file, read-only or full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(os.statvfs(folder).f_bsize))
    except (FileExistsError, NotADirectoryError):
        raise SettingError(f"{setting} {str(folder)!r} is, or lies in, a file; set another folder") from None
    except OSError as error:
        raise SettingError(
            f"{setting} {str(folder)!r} cannot be written to: {NO_ROOM.get(error.errno or 0) or error.strerror}"
        ) from error
