"""Folders that belong to one process at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class FolderInUseError(RuntimeError):
    """Another process holds a folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a folder for the time of a block.

    The system knows the holder (`flock` of the folder itself): there is no lock file, and nothing is held once the
    process, and what it has forked, is gone. On network file systems others on the same machine are kept out alone.

    Raises:
        FolderInUseError: if another process, or another block of this one, holds it.
        OSError: if it does not exist, or the file system cannot lock it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderInUseError(f"another process holds {str(folder)!r}") from error
        yield
    finally:
        os.close(descriptor)
