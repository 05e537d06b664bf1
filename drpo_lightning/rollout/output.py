"""What a child process prints: passed on, and its end kept."""

import contextlib
import os
import threading
from multiprocessing.connection import Connection

TAIL_BYTES = 16 * 2**10


class ChildOutput:
    """Passes what a child process prints on to this process's stderr, and keeps the end of it.

    Args:
        pipe: what the child prints to, read until all who write to it are gone.
    """

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._tail = b""
        self._thread = threading.Thread(target=self._read, name="engine-output", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with self._pipe:
            while chunk := os.read(self._pipe.fileno(), 2**16):
                self._tail = (self._tail + chunk)[-TAIL_BYTES:]
                with contextlib.suppress(OSError):  # nobody reads our stderr: the child's end is kept all the same
                    os.write(2, chunk)

    def last_lines(self, num_lines: int, timeout_seconds: float = 1.0) -> str:
        """The last lines of a child that has ended; waits for what is still on its way."""
        self._thread.join(timeout_seconds)
        return "\n".join(self._tail.decode(errors="replace").splitlines()[-num_lines:])
