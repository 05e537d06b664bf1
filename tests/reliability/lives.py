"""Runs `drpo` again and again, each life in processes forked from this one, which has imported all and started nothing.

python -m tests.reliability.lives: reads a life per line of standard input, as JSON with the fields of `Life`, and
writes a line with the exit statuses of its ranks; a rank that a signal has ended has minus its number.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from dataclasses import dataclass, field

import torch.utils.tensorboard  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

from drpo_lightning import cli

TIMEOUT_SECONDS = 120


@dataclass
class Life:
    """A command, what it prints to, its environment, and a signal that its first rank is sent after some seconds."""

    arguments: list[str]
    log: str
    num_ranks: int = 1
    port: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    signal: int = 0
    after_seconds: float = 0.0


def live(life, rank):
    """One rank, in the forked process."""
    output = os.open(life.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(life.environment)
    if life.num_ranks > 1:
        os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(life.port))
    # A command that a shell runs in the background ignores Ctrl-C, and what it starts does so too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Whatever seeds a fresh interpreter has drawn: nothing may hang on them.
    random.seed()
    sys.argv = ["drpo", *life.arguments]
    status = 0
    try:
        cli.main()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
        if isinstance(error.code, str):
            sys.stderr.write(error.code)
    except BaseException:  # noqa: BLE001 - as Python does
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def statuses(life):
    """Starts the ranks of a life and waits for them; when one is killed, so are the others."""
    pids = [fork(life, rank) for rank in range(life.num_ranks)]
    started, result = time.monotonic(), {}
    signal_is_due = life.signal
    while len(result) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            result[pid] = os.waitstatus_to_exitcode(status)
        seconds = time.monotonic() - started
        if signal_is_due and seconds > life.after_seconds and pids[0] not in result:
            signal_is_due = os.kill(pids[0], life.signal)
        if seconds > TIMEOUT_SECONDS or (pid and result[pid] < 0):
            for other in set(pids) - result.keys():
                os.kill(other, signal.SIGKILL)
        time.sleep(0.01)
    return [result[pid] for pid in pids]


def fork(life, rank):
    """Starts a rank in a process of its own."""
    pid = os.fork()
    if pid == 0:
        live(life, rank)
    return pid


if __name__ == "__main__":
    for line in sys.stdin:
        sys.stdout.write(json.dumps(statuses(Life(**json.loads(line)))) + "\n")
        sys.stdout.flush()
