"""The children's side of an isolated reward: a keeper that loads the reward, and the worker that it forks to score.

The keeper is a fresh process that runs none of the reward's code but its import. It is alive whatever the worker does:
a worker that is lost is forked again at once, and all are ended when the trainer is gone, however it went.
"""

import contextlib
import faulthandler
import json
import os
import pickle
import resource
import select
import signal
import socket
import struct
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from drpo_lightning.rewards.base import Reward, RewardBatch, checked_score
from drpo_lightning.rewards.reward_state import reward_state

HEADER = struct.Struct("!I")
"""Length in bytes of the message that follows."""
MAX_ANSWER_BYTES = 64 * 2**10
MAX_REASON_CHARACTERS = 500
START, STOP = b"+", b"-"
BEGUN = b"!"
"""What a worker says when it has a sample, before its answer: its time starts."""
PARENT_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class WorkerLimits:
    """What a worker may take.

    Args:
        timeout_seconds: for one sample.
        start_timeout_seconds: for loading the reward.
        memory_bytes: address space on top of what the loaded reward takes; None is no limit.
        max_processes: processes and threads of the user, on the whole machine; None is no limit.
    """

    timeout_seconds: float
    start_timeout_seconds: float
    memory_bytes: int | None
    max_processes: int | None

    def apply(self) -> None:
        """Limits this process and its children."""
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if self.max_processes is not None:
            _lower_limit(resource.RLIMIT_NPROC, self.max_processes)
        if self.memory_bytes is not None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            _lower_limit(resource.RLIMIT_AS, pages * resource.getpagesize() + self.memory_bytes)


def _lower_limit(kind: int, value: int) -> None:
    _, hard = resource.getrlimit(kind)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def send_message(link: socket.socket, message: dict[str, Any]) -> None:
    """Sends JSON with its length."""
    data = json.dumps(message).encode()
    link.sendall(HEADER.pack(len(data)) + data)


def receive_bytes(link: socket.socket) -> bytes | None:
    """Receives one message; None if the other side is gone."""
    header = _receive_exactly(link, HEADER.size)
    return None if header is None else _receive_exactly(link, HEADER.unpack(header)[0])


def _receive_exactly(link: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        chunk = link.recv(min(size - len(data), 2**20))
        if not chunk:
            return None
        data += chunk
    return bytes(data)


def keep(control: socket.socket, output: Connection, parent: int, payload: bytes, limits: WorkerLimits) -> None:
    """Main function of the keeper: loads the reward, then forks and ends workers as it is told.

    Args:
        control: one byte per command; START comes with the worker's own socket and is answered by its process id, STOP
            by its exit status.
        output: what is written to stdout and stderr goes here.
        parent: process id of the trainer.
        payload: the pickled reward.
        limits: of the workers.
    """
    os.setpgid(0, 0)  # a Ctrl-C in the terminal is for the trainer, which ends this process in order
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    output.close()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    signal.alarm(int(limits.start_timeout_seconds) + 1)  # the kernel ends an import that never ends
    try:
        reward = pickle.loads(payload)  # from the trainer
    except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the trainer
        traceback.print_exc()
        send_message(control, {"error": _reason(error)})
        return
    signal.alarm(0)
    faulthandler.enable()
    send_message(control, {"ready": True})
    worker = 0
    while os.getppid() == parent:
        if not select.select([control], [], [], PARENT_POLL_SECONDS)[0]:
            continue
        command, fds, _, _ = socket.recv_fds(control, 1, 1)
        if command == START:
            worker = _fork_worker(reward, socket.socket(fileno=fds[0]), control, limits)
            send_message(control, {"pid": worker})
        elif command == STOP:
            worker, status = 0, _end_worker(worker)
            send_message(control, {"status": status})
        else:
            break
    if worker:
        _end_worker(worker)
    os._exit(0)  # what the reward has imported need not be taken down in order


def _fork_worker(reward: Reward, link: socket.socket, control: socket.socket, limits: WorkerLimits) -> int:
    worker = os.fork()
    if worker == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            control.close()
            limits.apply()
            _serve(reward, link, limits)
            status = 0
        except BaseException:  # noqa: BLE001 - nothing may return into the keeper's code
            traceback.print_exc()
        finally:
            os._exit(status)
    link.close()
    with contextlib.suppress(OSError):  # whoever of the two comes first
        os.setpgid(worker, worker)
    return worker


def _end_worker(worker: int) -> int:
    """Kills a worker with its process group, unless it has ended by itself; returns its exit status."""
    with contextlib.suppress(OSError):
        os.killpg(worker, signal.SIGKILL)
    _, status = os.waitpid(worker, 0)
    return os.waitstatus_to_exitcode(status)


def _serve(reward: Reward, link: socket.socket, limits: WorkerLimits) -> None:
    """Main function of a worker: scores samples until the trainer hangs up."""
    me = os.getpid()
    while (request := receive_bytes(link)) is not None:
        number, batch, state = pickle.loads(request)  # from the trainer
        link.sendall(BEGUN)
        # Shortly before the end of its time, its own output says where it is; that takes no lock of Python's.
        faulthandler.dump_traceback_later(0.9 * limits.timeout_seconds)
        answer = _answer(reward, batch, state)
        if os.getpid() != me:  # a reward that forks and lets the child return
            os._exit(1)
        faulthandler.cancel_dump_traceback_later()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        send_message(link, {"number": number, **answer})


def _answer(reward: Reward, batch: RewardBatch, state: dict[str, Any] | None) -> dict[str, Any]:
    try:
        if state:
            reward.load_state_dict(state)  # type: ignore[attr-defined]
        scores = list(reward.score(batch))
        after = {} if state is None else {"state": reward_state(reward)}
    except BaseException as error:  # noqa: BLE001 - sys.exit too is a failure of the reward
        traceback.print_exception(error)
        return {"error": _reason(error)}
    if len(scores) != 1:
        return {"error": f"returned {len(scores)} scores for 1 completion"}
    try:
        return {"score": checked_score(scores[0]), **after}
    except ValueError as error:
        return {"error": str(error)[:MAX_REASON_CHARACTERS]}


def _reason(error: BaseException) -> str:
    return f"raised {type(error).__name__}: {error}"[:MAX_REASON_CHARACTERS]
