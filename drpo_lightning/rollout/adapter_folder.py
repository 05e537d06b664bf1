"""The private folder through which an engine reads adapters; those of processes that were killed are removed."""

import shutil
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from drpo_lightning.folder_lock import FolderInUseError, locked

PREFIX = "drpo-adapter-"
MIN_AGE_SECONDS = 60.0
"""Younger folders may be those of processes that have yet to lock them."""


class AdapterFolder:
    """A temporary folder that belongs to this process until `cleanup`, and to nobody once the process is gone.

    Attributes:
        name: the folder.
    """

    def __init__(self) -> None:
        remove_left_folders()
        self.name = tempfile.mkdtemp(prefix=PREFIX)
        self._held = ExitStack()
        self._held.enter_context(locked(Path(self.name)))

    def cleanup(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.name, ignore_errors=True)
        self._held.close()


def remove_left_folders() -> None:
    """Removes folders of this user whose process is gone."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError, FolderInUseError):
            if time.time() - path.stat().st_mtime > MIN_AGE_SECONDS:
                with locked(path):
                    shutil.rmtree(path)
