"""The child's side of an engine in a process of its own: answers calls, and never outlives its parent."""

import contextlib
import ctypes
import faulthandler
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drpo_lightning.rollout.weight_buffer import WeightBuffer, finish_copies

STACKS_SIGNAL = signal.SIGUSR1
"""Makes the child print where each of its threads is."""
PARENT_POLL_SECONDS = 0.5
OUT_OF_MEMORY_SCORE = 500
"""Added to the kernel's badness of 0 to 1000: when memory runs out it ends the engine, not the trainer."""
SET_PARENT_DEATH_SIGNAL = 1
"""`PR_SET_PDEATHSIG` of prctl(2)."""


class Heartbeat:
    """Counters in shared memory, by which another process sees that work goes on."""

    def __init__(self) -> None:
        self._count = torch.zeros(1, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._busy_seconds = torch.zeros(1, dtype=torch.float64).share_memory_()  # type: ignore[no-untyped-call]

    def beat(self) -> None:
        """Shows progress."""
        self._count += 1

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Shows progress, and adds the time of the block to `busy_seconds`."""
        self.beat()
        started = time.perf_counter()
        yield
        self._busy_seconds += time.perf_counter() - started

    @property
    def count(self) -> int:
        """Beats so far."""
        return int(self._count)

    @property
    def busy_seconds(self) -> float:
        """Time in `beating` so far."""
        return float(self._busy_seconds)


def serve(
    connection: Connection,
    output: Connection,
    buffer: WeightBuffer,
    parent: int,
    factory: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """Main function of the child: builds an object and answers calls of its methods until `close`.

    Args:
        connection: where calls come from and answers go to.
        output: where all that the process prints goes to.
        buffer: through which weights arrive.
        parent: process id of the parent.
        factory: builds the object.
        args: its arguments.
    """
    os.setpgid(0, 0)  # a Ctrl-C in the terminal is for the trainer, which ends this process in order
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a scheduler sends it to all; the trainer ends in order, then this
    _end_with_parent(parent)
    _print_to(output)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OUT_OF_MEMORY_SCORE))
    with contextlib.suppress(EOFError, ConnectionError):  # the parent does not want to know any more
        _answer_calls(connection, buffer, factory, args)


def _end_with_parent(parent: int) -> None:
    """Ends this process, and its own children, as soon as the parent is gone."""
    if sys.platform == "linux":  # by the kernel, also if this process hangs or is stopped
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_SECONDS)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def _print_to(output: Connection) -> None:
    """Sends stdout and stderr to the parent, also those of native code, and the stacks if the process crashes."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable()
    faulthandler.register(STACKS_SIGNAL)


def _answer_calls(
    connection: Connection, buffer: WeightBuffer, factory: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    try:
        target = factory(*args)
    except Exception:  # noqa: BLE001 - whatever it is, it is the answer to the first call
        connection.recv()
        connection.send(("error", traceback.format_exc()))
        return
    work: Callable[[], bool] = getattr(target, "work", lambda: False)
    while True:
        failure = _work_until_called(connection, work)
        method, call_args, kwargs = connection.recv()
        if method == "close":
            target.close()
            return
        if method == "load_weights":
            call_args = (_incoming_weights(connection, buffer), *call_args)
            if failure:
                connection.recv()  # the buffer and the first bucket, which come with the call
                connection.recv()
        connection.send_bytes(failure or _answer(target, method, call_args, kwargs))


def _work_until_called(connection: Connection, work: Callable[[], bool]) -> bytes:
    """Works as long as there is something to do and no call has come; what to answer it if that has failed."""
    try:
        while not connection.poll() and work():
            pass
    except Exception:  # noqa: BLE001 - whatever it is, it is the answer to the next call
        return pickle.dumps(("error", traceback.format_exc()))
    return b""


def _answer(target: Any, method: str, args: Any, kwargs: Any) -> bytes:  # noqa: ANN401
    try:
        # Plain bytes: sent as they are, tensors would each hold a file descriptor open.
        return pickle.dumps(("ok", getattr(target, method)(*args, **kwargs)))
    except Exception:  # noqa: BLE001 - whatever it is, it belongs to the caller in the other process
        return pickle.dumps(("error", traceback.format_exc()))


def _incoming_weights(connection: Connection, buffer: WeightBuffer) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of each bucket as copies, since an engine may keep them until a layer is complete."""
    content = buffer.borrowed(connection.recv())
    while (layout := connection.recv()) is not None:
        tensors = []
        for name, dtype, shape, offset in layout:
            size = torch.Size(shape).numel() * dtype.itemsize
            tensors.append((name, content[offset : offset + size].view(dtype).view(shape).clone()))
        finish_copies(content)
        connection.send(("ok", None))
        yield from tensors
