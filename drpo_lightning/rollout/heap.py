"""Memory that was freed and that the C library keeps."""

import ctypes
import sys


def give_back_freed_memory() -> None:
    """Gives what this process has freed back to the system, where the C library is glibc.

    An engine on a CPU frees many tensors of changing sizes at every token. glibc keeps the gaps between those that are
    left, and a process grows by a tenth of a MiB per rollout without holding any more than before.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
