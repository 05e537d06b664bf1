"""A rollout engine in a process of its own: calls over a private pipe, weights through memory that both see."""

import atexit
import contextlib
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import wait
from typing import Any

import torch
from torch import Tensor

from drpo_lightning.rollout.engine import EngineError
from drpo_lightning.rollout.output import ChildOutput
from drpo_lightning.rollout.served import STACKS_SIGNAL, Heartbeat, serve
from drpo_lightning.rollout.weight_buffer import WeightBuffer, finish_copies

BUCKET_BYTES = 64 * 2**20
"""Weights travel in buckets of at least this size; a larger tensor has a bucket of its own size."""
POLL_SECONDS = 0.1
STACKS_SECONDS = 0.5
"""What a hung child gets to print where it is."""
NUM_LAST_LINES = 40
"""Of the child's output, in an error."""


class EngineProcess:
    """Runs an object in a child process and calls its methods there.

    The child's death is noticed at once. While a call lasts a thread looks at the clock and ends a child that takes too
    long, so that nothing waits for ever: neither for an answer nor, with a stopped child, for it to take the question.
    The child ends itself when its parent, the thread that made this object, is gone.

    An object with a method `work` has it called between calls, as long as it returns True: for work that goes on while
    nobody waits for it. What it raises is the answer to the next call.

    Args:
        factory: builds the object in the child; importable by name.
        args: arguments of the factory.
        environment: environment variables of the child, set before it imports anything heavy.
        bucket_bytes: size of the shared buffer that weights travel through, at least that of the largest tensor.
        heartbeat: what the object shows progress with, if it does; one of `args`, too.
        device: where that buffer is: in the host's memory, or on the child's only GPU for as long as weights travel.
    """

    def __init__(
        self,
        factory: Callable[..., Any],
        args: tuple[Any, ...],
        environment: dict[str, str],
        bucket_bytes: int,
        heartbeat: Heartbeat | None = None,
        device: torch.device | None = None,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, child = context.Pipe()
        output, childs_output = context.Pipe(duplex=False)
        self._buffer = WeightBuffer(bucket_bytes, device or torch.device("cpu"))
        self._heartbeat = heartbeat
        self._is_idle = True
        """False while the child works on a call, and for ever after a call that was broken off."""
        self._verdict = ""
        """Why the child was ended."""
        # Not a daemon, which could have no children of its own.
        with _environment(environment):
            self._process = context.Process(
                target=serve,
                args=(child, childs_output, self._buffer, os.getpid(), factory, args),
                name="rollout-engine",
            )
            self._process.start()
        child.close()
        childs_output.close()
        self._output = ChildOutput(output)
        # A Python program that forgets to close us would otherwise wait for the child for ever when it ends.
        atexit.register(self.close)

    @property
    def pid(self) -> int | None:
        """Process id of the child."""
        return self._process.pid

    def call(
        self,
        method: str,
        *args: Any,  # noqa: ANN401
        timeout_seconds: float,
        stall_timeout_seconds: float = math.inf,
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Calls a method of the object in the child and returns its result.

        Args:
            method: its name.
            args: its arguments.
            timeout_seconds: how long it may take.
            stall_timeout_seconds: how long it may go without a heartbeat.
            kwargs: its arguments by name.

        Raises:
            EngineError: if the method raised there, the child died, or was ended since it took too long.
        """
        return self._exchange(method, [(method, args, kwargs)], timeout_seconds, stall_timeout_seconds)

    def load_weights(
        self,
        weights: Iterable[tuple[str, Tensor]],
        *args: Any,  # noqa: ANN401
        timeout_seconds: float,
    ) -> None:
        """Streams weights through the shared buffer into the object's `load_weights`.

        Args:
            weights: name and tensor.
            args: further arguments of the method.
            timeout_seconds: how long each bucket may take.

        Raises:
            EngineError: as `call`.
        """
        head: list[Any] = [("load_weights", args, {})]
        with self._buffer.lent() as (content, message):
            head.append(message)
            for layout in _fill_buckets(weights, content):
                finish_copies(content)
                self._exchange("load_weights", [*head, layout], timeout_seconds)
                head = []
                self._is_idle = False  # it waits for the next bucket
            self._exchange("load_weights", [*head, None], timeout_seconds)

    def _exchange(
        self, method: str, messages: Iterable[Any], timeout_seconds: float, stall_timeout_seconds: float = math.inf
    ) -> Any:  # noqa: ANN401
        """Sends messages and returns the answer."""
        self._is_idle = False
        try:
            with self._watched(method, timeout_seconds, stall_timeout_seconds):
                for message in messages:
                    self._connection.send(message)
                kind, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise EngineError(self._obituary(method)) from error
        self._is_idle = True
        if kind == "error":
            raise EngineError(f"`{method}` failed in the engine's process:\n{value}")
        return value

    @contextlib.contextmanager
    def _watched(self, method: str, timeout_seconds: float, stall_timeout_seconds: float) -> Iterator[None]:
        """Ends the child if the block takes too long: what the block waits for then ends with an error."""
        is_over = threading.Event()
        arguments = (is_over, method, timeout_seconds, stall_timeout_seconds)
        thread = threading.Thread(target=self._watch, args=arguments, name="engine-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def _watch(
        self, is_over: threading.Event, method: str, timeout_seconds: float, stall_timeout_seconds: float
    ) -> None:
        started = last_beat = time.monotonic()
        count = 0
        while not is_over.wait(POLL_SECONDS):
            now = time.monotonic()
            if self._heartbeat is not None and self._heartbeat.count != count:
                count, last_beat = self._heartbeat.count, now
            if wait([self._process.sentinel], 0):
                self._kill()  # its own children, who may hold our pipe open
                return
            if now - started > timeout_seconds:
                self._verdict = f"did not answer `{method}` within {timeout_seconds:g} s and was ended"
            elif now - last_beat > stall_timeout_seconds:
                self._verdict = f"made no progress in `{method}` for {stall_timeout_seconds:g} s and was ended"
            else:
                continue
            self._signal(STACKS_SIGNAL)
            wait([self._process.sentinel], STACKS_SECONDS)
            self._kill()
            return

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid or 0, number)

    def _kill(self) -> None:
        """Ends the child and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.kill()

    def _obituary(self, method: str) -> str:
        """What became of the child, and the last that it printed."""
        self._process.join(timeout=5)
        self._kill()
        end = f"{self._verdict}; raise the engine's timeout if it only needs longer"
        if not self._verdict:
            end = f"died {_cause_of_death(self._process.exitcode)} in `{method}`"
        lines = self._output.last_lines(NUM_LAST_LINES)
        return f"the engine's process {end}." + (f" Its last output:\n{lines}" if lines else " It printed nothing.")

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Ends the child: asks it to unless it is at work, then kills it and its process group. May be called again."""
        atexit.unregister(self.close)
        if self._connection.closed:
            return
        if self._is_idle:
            with contextlib.suppress(OSError):
                self._connection.send(("close", (), {}))
            self._process.join(timeout_seconds)
        self._kill()
        self._process.join(timeout_seconds)
        self._connection.close()


def _fill_buckets(
    weights: Iterable[tuple[str, Tensor]], buffer: Tensor
) -> Iterator[list[tuple[str, torch.dtype, Any, int]]]:
    """Copies tensors into a buffer; yields name, dtype, shape and offset of each whenever it is full."""
    layout: list[tuple[str, torch.dtype, Any, int]] = []
    used = 0
    for name, tensor in weights:
        if used + tensor.nbytes > buffer.nbytes and layout:
            yield layout
            layout, used = [], 0
        target = buffer[used : used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        target.copy_(tensor)
        layout.append((name, tensor.dtype, tuple(tensor.shape), used))
        used += -(-tensor.nbytes // 16) * 16  # the next view must start at a multiple of its item size
        del tensor  # it may be a gathered one, and the next is gathered before this name is bound again
    if layout:
        yield layout


def _cause_of_death(exit_code: int | None) -> str:
    """How a process ended, in words."""
    if exit_code is None or exit_code >= 0:
        return f"(exit code {exit_code})"
    name = signal.Signals(-exit_code).name
    hint = ", as the kernel does when memory runs out" if name == "SIGKILL" else ""
    return f"(killed by {name}{hint})"


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
