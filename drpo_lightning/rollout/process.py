"""A rollout engine in a process of its own: calls over a private pipe, weights through shared memory."""

import atexit
import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from drpo_lightning.rollout.engine import EngineError

if TYPE_CHECKING:
    from collections.abc import Callable

BUCKET_BYTES = 64 * 2**20
"""Weights travel in buckets of at least this size; a larger tensor has a bucket of its own size."""


class EngineProcess:
    """Runs an object in a child process and calls its methods there.

    Every wait has a timeout, and notices the child's death at once. The child ends itself when its parent is gone.

    Args:
        factory: builds the object in the child; importable by name.
        args: arguments of the factory.
        environment: environment variables of the child, set before it imports anything heavy.
        bucket_bytes: size of the shared buffer that weights travel through, at least that of the largest tensor.
    """

    def __init__(
        self, factory: "Callable[..., Any]", args: tuple[Any, ...], environment: dict[str, str], bucket_bytes: int
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, child = context.Pipe()
        self._buffer = torch.empty(bucket_bytes, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]
        # Not a daemon, which could have no children of its own; `_watch_parent` sees to it that it never outlives us.
        with _environment(environment):
            self._process = context.Process(
                target=_serve, args=(child, self._buffer, factory, args), name="rollout-engine"
            )
            self._process.start()
        child.close()
        # A Python program that forgets to close us would otherwise wait for the child for ever when it ends.
        atexit.register(self.close)

    @property
    def pid(self) -> int | None:
        """Process id of the child."""
        return self._process.pid

    def call(self, method: str, *args: Any, timeout_seconds: float, **kwargs: Any) -> Any:  # noqa: ANN401
        """Calls a method of the object in the child and returns its result.

        Raises:
            EngineError: if the method raised there, the child died, or no answer came in time.
        """
        self._send((method, args, kwargs))
        return self._receive(method, timeout_seconds)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *, timeout_seconds: float) -> None:
        """Streams weights through the shared buffer into the object's `load_weights`.

        Raises:
            EngineError: as `call`; the timeout is for each bucket.
        """
        self._send(("load_weights", (), {}))
        for layout in self._fill_buckets(weights):
            self._send(layout)
            self._receive("load_weights", timeout_seconds)
        self._send(None)
        self._receive("load_weights", timeout_seconds)

    def _fill_buckets(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, torch.dtype, Any, int]]]:
        """Copies tensors into the buffer; yields name, dtype, shape and offset of each whenever it is full."""
        layout: list[tuple[str, torch.dtype, Any, int]] = []
        used = 0
        for name, tensor in weights:
            if used + tensor.nbytes > self._buffer.nbytes and layout:
                yield layout
                layout, used = [], 0
            target = self._buffer[used : used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            target.copy_(tensor)
            layout.append((name, tensor.dtype, tuple(tensor.shape), used))
            used += -(-tensor.nbytes // 16) * 16  # the next view must start at a multiple of its item size
            del tensor  # it may be a gathered one, and the next is gathered before this name is bound again
        if layout:
            yield layout

    def _send(self, message: Any) -> None:  # noqa: ANN401
        try:
            self._connection.send(message)
        except OSError as error:
            raise EngineError(self._death_notice()) from error

    def _receive(self, method: str, timeout_seconds: float) -> Any:  # noqa: ANN401
        ready = wait([self._connection, self._process.sentinel], timeout_seconds)
        if self._connection in ready:
            try:
                kind, value = self._connection.recv()
            except (EOFError, OSError) as error:
                raise EngineError(self._death_notice()) from error
            if kind == "error":
                raise EngineError(f"`{method}` failed in the engine's process:\n{value}")
            return value
        if ready:
            raise EngineError(self._death_notice())
        self.close()
        raise EngineError(
            f"the engine's process did not answer `{method}` within {timeout_seconds:g} s and was ended; "
            "raise the engine's timeout if it only needs longer"
        )

    def _death_notice(self) -> str:
        self._process.join(timeout=5)
        return f"the engine's process died (exit code {self._process.exitcode}); its own output stands above"

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Ends the child: asks it to, then kills it and its process group. May be called again."""
        atexit.unregister(self.close)
        if self._process.is_alive():
            with contextlib.suppress(OSError):
                self._connection.send(("close", (), {}))
            self._process.join(timeout_seconds)
        if self._process.is_alive():
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid or 0, signal.SIGKILL)
            self._process.kill()
            self._process.join(timeout_seconds)
        self._connection.close()


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets environment variables for the time of a block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _watch_parent() -> None:
    """Ends this process and its own children as soon as the parent is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(os.getpgid(0), signal.SIGKILL)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def _serve(connection: Connection, buffer: Tensor, factory: "Callable[..., Any]", args: tuple[Any, ...]) -> None:
    """Main function of the child: answers calls until `close`."""
    os.setpgid(0, 0)  # a Ctrl-C in the terminal is for the trainer, which ends this process in order
    _watch_parent()
    try:
        target = factory(*args)
    except Exception:  # noqa: BLE001 - whatever it is, it is the answer to the first call
        with contextlib.suppress(EOFError):
            connection.recv()
            connection.send(("error", traceback.format_exc()))
        return
    while True:
        try:
            method, call_args, kwargs = connection.recv()
        except EOFError:
            return
        if method == "close":
            target.close()
            return
        try:
            if method == "load_weights":
                target.load_weights(_incoming_weights(connection, buffer))
                result = None
            else:
                result = getattr(target, method)(*call_args, **kwargs)
        except Exception:  # noqa: BLE001 - whatever it is, it belongs to the caller in the other process
            connection.send(("error", traceback.format_exc()))
        else:
            # Plain bytes: sent as they are, tensors would each hold a file descriptor open.
            connection.send_bytes(pickle.dumps(("ok", result)))


def _incoming_weights(connection: Connection, buffer: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of each bucket as copies, since an engine may keep them until a layer is complete."""
    while (layout := connection.recv()) is not None:
        tensors = []
        for name, dtype, shape, offset in layout:
            size = torch.Size(shape).numel() * dtype.itemsize
            tensors.append((name, buffer[offset : offset + size].view(dtype).view(shape).clone()))
        connection.send(("ok", None))
        yield from tensors
