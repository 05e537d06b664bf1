"""Rewards in processes of their own: whatever a reward does there, it costs one sample and no more than its time.

Against accidents, not against malice: the processes have the trainer's files, network and rights.
"""

import atexit
import contextlib
import json
import multiprocessing
import os
import pickle
import selectors
import signal
import socket
import time
from collections import deque
from multiprocessing.connection import Connection
from typing import Any

from drpo_lightning.errors import SettingError
from drpo_lightning.rewards.base import Reward, RewardBatch, RewardError, RewardFailure, RewardOutcome, checked_score
from drpo_lightning.rewards.isolation_worker import (
    BEGUN,
    HEADER,
    MAX_ANSWER_BYTES,
    START,
    STOP,
    WorkerLimits,
    keep,
    receive_bytes,
)
from drpo_lightning.rewards.reward_state import reward_state

TAIL_BYTES = 4096
"""Of a sample's output, so much of the end is kept."""
DRAIN_BYTES = 2**20
"""Output that is read at a time: a worker that writes without end does not keep the trainer from its clock."""
KEEPER_SECONDS = 10.0
"""How long a keeper, which runs nothing of the reward's by then, may take to answer."""


class IsolatedScorer:
    """Scores completions one at a time in worker processes, which are kept until `close`.

    Args:
        reward: what scores; it is pickled.
        num_workers: processes that score at the same time.
        limits: of each worker.

    Attributes:
        state: of a reward with a `state_dict`, after the last sample that did not fail; None for others. A worker that
            is started gets it.

    Raises:
        SettingError: if the reward cannot be pickled; or if it has a state that is not what JSON can hold, or that
            several workers would have each for itself.
    """

    def __init__(self, reward: Reward, *, num_workers: int, limits: WorkerLimits) -> None:
        try:
            payload = pickle.dumps(reward)
        except Exception as error:
            raise SettingError(
                f"the reward {reward.name!r} cannot be pickled, which sending it to a worker process takes: {error}. "
                "Define it, and the functions that it holds, at the top of a module, and open files and connections "
                "in `score`"
            ) from error
        self.state = reward_state(reward)
        if self.state is not None and num_workers > 1:
            raise SettingError(
                f"the reward {reward.name!r} has a state (`state_dict`), and each of {num_workers} workers would have "
                "its own; set `num_workers: 1`"
            )
        self._workers = [_Worker(reward.name, payload, limits) for _ in range(num_workers)]

    def start(self) -> None:
        """Starts the processes that do not run, without waiting for them."""
        for worker in self._workers:
            worker.launch()
        atexit.register(self.close)

    def score(self, batch: RewardBatch) -> list[RewardOutcome]:
        """Scores every completion of a batch.

        Raises:
            RewardError: if the reward cannot be loaded in the worker processes.
        """
        self.start()
        try:
            for worker in self._workers:
                worker.make_ready()
            return self._score(batch)
        except BaseException:  # what is left half done, also by Ctrl-C, must not be taken for the next batch's
            self.close()
            raise

    def _score(self, batch: RewardBatch) -> list[RewardOutcome]:
        outcomes: list[RewardOutcome] = [None] * len(batch)
        waiting = deque(range(len(batch)))
        busy: dict[_Worker, int] = {}
        while waiting or busy:
            for worker in self._workers:
                if waiting and worker not in busy:
                    busy[worker] = waiting.popleft()
                    worker.begin(batch.single(busy[worker]), self.state)
            _wait(list(busy))
            for worker in list(busy):
                if worker.advance():
                    outcomes[busy.pop(worker)] = worker.outcome
                    self.state = worker.state
        return outcomes

    def close(self) -> None:
        """Ends all processes. May be called again; `start` and `score` begin anew."""
        atexit.unregister(self.close)
        for worker in self._workers:
            worker.hang_up()
        for worker in self._workers:
            worker.join()


class _Worker:
    """The trainer's side of one keeper and its worker.

    Attributes:
        outcome: of the last sample.
        state: of the reward after it; after a failure, that of before.
        deadline: when the present sample's time is over, by `time.monotonic`.
    """

    def __init__(self, name: str, payload: bytes, limits: WorkerLimits) -> None:
        self._name = name
        self._payload = payload
        self._limits = limits
        self._process: multiprocessing.process.BaseProcess | None = None
        self._control: socket.socket
        self._output: Connection
        self._link: socket.socket | None = None
        self._pid = 0
        self._number = 0
        self._outgoing = memoryview(b"")
        self._has_begun = False
        self._incoming = bytearray()
        self._tail = bytearray()
        self.deadline = 0.0
        self.outcome: RewardOutcome = None
        self.state: dict[str, Any] | None = None

    # ---------------------------------------------------------------- processes

    def launch(self) -> None:
        """Starts the keeper, unless it runs."""
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")
        self._control, control = socket.socketpair()
        self._output, output = context.Pipe(duplex=False)
        os.set_blocking(self._output.fileno(), False)
        # Not a daemon, which could have no children of its own; the keeper sees to it that it never outlives us.
        self._process = context.Process(
            target=keep, args=(control, output, os.getpid(), self._payload, self._limits), name=f"reward-{self._name}"
        )
        self._process.start()
        control.close()
        output.close()

    def make_ready(self) -> None:
        """Waits until the reward is loaded, and has a worker.

        Raises:
            RewardError: if it cannot be loaded, or takes too long.
        """
        if self._link is not None:
            return
        assert self._process is not None, "launch comes first"
        message = self._ask(None, self._limits.start_timeout_seconds)
        if message is None or "ready" not in message:
            reason = (message or {}).get("error") or (
                f"its process ended or did not answer within {self._limits.start_timeout_seconds:g} s"
            )
            tail = self._last_output()
            raise RewardError(f"reward {self._name!r} cannot be loaded in a worker process: {reason}\n{tail}")
        self._fork()

    def _fork(self) -> None:
        """Has the keeper fork a worker, with a new socket: what the one before has half written is gone."""
        self._link, link = socket.socketpair()
        self._link.setblocking(False)
        with link, contextlib.suppress(OSError):  # a keeper that is gone does not answer either
            socket.send_fds(self._control, [START], [link.fileno()])
        message = self._ask(None, KEEPER_SECONDS)
        if message is None:
            raise RewardError(f"reward {self._name!r}: its process cannot start a worker\n{self._last_output()}")
        self._pid = message["pid"]

    def _ask(self, command: bytes | None, timeout_seconds: float) -> dict[str, Any] | None:
        """Sends the keeper a command, if one is given, and returns its answer; None if it is gone."""
        deadline = time.monotonic() + timeout_seconds
        try:
            if command is not None:
                self._control.sendall(command)
            with selectors.DefaultSelector() as selector:
                selector.register(self._control, selectors.EVENT_READ)
                selector.register(self._output, selectors.EVENT_READ)
                while all(key.fileobj is not self._control for key, _ in selector.select(0.1)):
                    self._drain()  # an import may write more than the pipe holds
                    if time.monotonic() > deadline:
                        return None
            message = receive_bytes(self._control)
        except OSError:
            return None
        return None if message is None else json.loads(message)

    def _replace(self) -> int | None:
        """Ends the worker and everything that it has started, and starts another; returns its exit status."""
        message = self._ask(STOP, KEEPER_SECONDS)
        self._drain()
        if message is None:  # the keeper itself was killed, as by the system when memory runs out
            tail = bytes(self._tail)
            self.hang_up()
            self.join()
            self.launch()
            self.make_ready()
            self._tail[:] = tail
            return None
        assert self._link is not None, "it had one"
        self._link.close()
        self._pid = 0
        self._fork()
        return int(message["status"])

    def hang_up(self) -> None:
        """Tells the keeper to end, by ending what it listens to, whoever else may have inherited that."""
        if self._process is None:
            return
        if self._link is None:  # it may be in an import that never ends
            self._kill()
        else:
            self._link.close()
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        self._control.close()

    def _kill(self) -> None:
        """Kills the keeper, and what the import of the reward may have started."""
        assert self._process is not None, "launch comes first"
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid or 0, signal.SIGKILL)
        self._process.kill()

    def join(self) -> None:
        """Waits for the keeper's end after `hang_up`, and ends the worker itself where the keeper has not."""
        if self._process is None:
            return
        deadline = time.monotonic() + KEEPER_SECONDS
        # Not `Process.join`, which waits for all who have inherited a pipe from the keeper.
        while self._process.exitcode is None:
            if time.monotonic() > deadline:
                self._kill()
            time.sleep(0.005)
        if self._process.exitcode != 0 and self._pid:
            with contextlib.suppress(OSError):
                os.killpg(self._pid, signal.SIGKILL)
        self._process.close()
        self._output.close()
        self._process, self._link, self._pid = None, None, 0

    # ---------------------------------------------------------------- one sample

    def begin(self, batch: RewardBatch, state: dict[str, Any] | None) -> None:
        """Gives the worker a sample and the reward's state; its clock starts when it says that it has them."""
        if not self._is_idle():
            self._replace()
        self._drain()
        self._tail.clear()
        self._incoming.clear()
        self._number += 1
        self.state = state
        request = pickle.dumps((self._number, batch, state))
        self._outgoing = memoryview(HEADER.pack(len(request)) + request)
        self._has_begun = False
        self.deadline = time.monotonic() + KEEPER_SECONDS
        self._exchange()

    def _is_idle(self) -> bool:
        """False if the worker died, or said something that it was not asked, since its last sample."""
        assert self._link is not None, "make_ready comes first"
        try:
            self._link.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def register(self, selector: selectors.BaseSelector) -> None:
        """What the trainer waits for."""
        assert self._link is not None, "make_ready comes first"
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outgoing else 0)
        selector.register(self._link, events)
        selector.register(self._output, selectors.EVENT_READ)

    def advance(self) -> bool:
        """Sends, receives and looks at the clock, without waiting; True if there is an `outcome`."""
        is_flooded = self._drain()
        if not self._exchange():
            status = self._replace()
            self.outcome = self._failure(f"made its worker process end: {_status_in_words(status)}")
            return True
        if self._is_complete():
            self.outcome = self._parsed()
            return True
        if time.monotonic() < self.deadline:
            return False
        self._replace()
        reason = f"took longer than {self._limits.timeout_seconds:g} s"
        reason += ", writing without end" if is_flooded else ""
        self.outcome = RewardFailure("timeout", reason, self._last_output())
        return True

    def _exchange(self) -> bool:
        """Sends and receives what can be; False if the worker is gone."""
        assert self._link is not None, "make_ready comes first"
        try:
            if self._outgoing:
                self._outgoing = self._outgoing[self._link.send(self._outgoing) :]
        except BlockingIOError:
            pass
        except OSError:
            return False
        try:
            chunk = self._link.recv(MAX_ANSWER_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._incoming += chunk
        if chunk and not self._has_begun:
            self._has_begun = True
            self.deadline = time.monotonic() + self._limits.timeout_seconds
        return bool(chunk) or self._is_complete()

    def _is_complete(self) -> bool:
        """True if the answer is there, or so much that it cannot be one."""
        start = len(BEGUN) + HEADER.size
        if len(self._incoming) < start:
            return False
        size: int = HEADER.unpack_from(self._incoming, len(BEGUN))[0]
        return size > MAX_ANSWER_BYTES or len(self._incoming) >= start + size

    def _parsed(self) -> RewardOutcome:
        """The answer as an outcome. It is from other people's code: nothing in it is taken on trust."""
        try:
            answer = json.loads(self._incoming[len(BEGUN) + HEADER.size :])
            if answer["number"] != self._number:
                raise ValueError("of another sample")  # noqa: TRY301
            if "error" in answer:
                return self._failure(str(answer["error"]))
            score = checked_score(answer["score"])
            if self.state is not None:
                self.state = dict(answer["state"])
            return score  # noqa: TRY300
        except (ValueError, TypeError, KeyError, RecursionError):
            self._replace()
            return self._failure("sent an answer that is none, past its worker process")

    def _failure(self, reason: str) -> RewardFailure:
        self._drain()
        return RewardFailure("error", reason, self._last_output())

    def _drain(self) -> bool:
        """Reads what the worker has written and keeps the end of it; True if there is more."""
        read = 0
        with contextlib.suppress(BlockingIOError):
            while read < DRAIN_BYTES and (chunk := os.read(self._output.fileno(), 2**16)):
                read += len(chunk)
                self._tail = (self._tail + chunk)[-TAIL_BYTES:]
        return read >= DRAIN_BYTES

    def _last_output(self) -> str:
        return self._tail.decode(errors="replace").strip()


def _wait(workers: list[_Worker]) -> None:
    """Waits until one of the workers has something to say, or the time of one is over."""
    with selectors.PollSelector() as selector:
        for worker in workers:
            worker.register(selector)
        selector.select(max(0.0, min(worker.deadline for worker in workers) - time.monotonic()))


def _status_in_words(status: int | None) -> str:
    if status is None:
        return "it was killed together with its keeper"
    if status >= 0:
        return f"exit code {status}"
    return f"killed by signal {-status} ({signal.strsignal(-status)})"
