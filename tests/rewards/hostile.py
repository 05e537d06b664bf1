"""A reward that does what the completion says, importable in a worker process."""

import ctypes
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from drpo_lightning.rewards import Reward

EXITS, LOOPS = 3, 5
"""Token ids that add up to a multiple of these make `Fragile` exit or loop."""


class UnspeakableError(Exception):
    def __str__(self):
        raise ValueError("no words")


def loop():
    while True:
        pass


def exhaust_memory():
    return float(len(bytearray(2**32)))


def flood(num_bytes=math.inf):
    written = 0
    while written < num_bytes:
        written += os.write(1 + written % 2, b"flood " * 10_000)
    return 0.5


def fork_and_return(path):
    """The child goes on as if it were the worker."""
    child = os.fork()
    if child:
        Path(path).write_text(str(child))
    return 0.25 if child else 0.75


def child_that_stays(path):
    child = subprocess.Popen(["sleep", "1000"])
    Path(path).write_text(str(child.pid))
    loop()


def many_children():
    for _ in range(20):
        subprocess.Popen(["sleep", "1000"])
    loop()


def raise_(error):
    raise error


def recurse(depth=0):
    return recurse(depth + 1) + 1


def write_into_every_file(data):
    for descriptor in range(3, 64):
        try:
            os.set_blocking(descriptor, False)
            os.write(descriptor, data)
        except OSError:
            pass
    time.sleep(1000)


def forged_answer(number):
    answer = f'{{"number": {number}, "score": 9.0}}'.encode()
    return len(answer).to_bytes(4, "big") + answer


def say_pid_and_loop(path):
    Path(path).write_text(f"{os.getpid()} {os.getppid()}")
    re.match(r"(a+)+$", "a" * 60 + "b")


ACTS = {
    "raise": lambda _: raise_(KeyError("nothing there")),
    "unspeakable": lambda _: raise_(UnspeakableError()),
    "interrupt": lambda _: raise_(KeyboardInterrupt()),
    "recurse": lambda _: recurse(),
    "sys.exit": lambda _: sys.exit(0),
    "exit thread": lambda _: threading.Thread(target=os._exit, args=(7,)).start() or time.sleep(1000),
    "os._exit": lambda _: os._exit(0),
    "segfault": lambda _: ctypes.string_at(0),
    "abort": lambda _: os.abort(),
    "kill": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    "loop": lambda _: loop(),
    "loop with lock": lambda _: re.match(r"(a+)+$", "a" * 60 + "b"),
    "sleep": lambda _: time.sleep(1000),
    "memory": lambda _: exhaust_memory(),
    "list without end": lambda _: list(itertools.count()),
    "flood": lambda _: flood(),
    "short flood": lambda _: flood(30 * 2**20),
    "fork": fork_and_return,
    "child": child_that_stays,
    "children": lambda _: many_children(),
    "lambda": lambda _: lambda: 0,
    "nan": lambda _: math.nan,
    "inf": lambda _: math.inf,
    "huge": lambda _: 1e300,
    "text": lambda _: "1.0",
    "none": lambda _: None,
    "close files": lambda _: os.closerange(0, 256),
    "write into files": lambda _: write_into_every_file(b"\x00\x00\x00\x05hello" * 100),
    "answer for another": lambda _: write_into_every_file(forged_answer(0)),
    "pid": lambda _: float(os.getpid()),
    "parent pid": lambda _: float(os.getppid()),
    "say pid": say_pid_and_loop,
    "memory limit": lambda _: float(__import__("resource").getrlimit(9)[0]),
    "process limit": lambda _: float(__import__("resource").getrlimit(6)[0]),
}


class Hostile(Reward):
    name = "hostile"
    weight = 1.0

    def score(self, batch):
        if batch.completions[0] == "two scores":
            return [1.0, 2.0]
        if batch.completions[0] == "no list":
            return 1.0
        scores = []
        for text, path in zip(batch.completions, batch.columns.get("path", [None] * len(batch)), strict=True):
            sys.stderr.write(f"the act is {text}\n")
            scores.append(ACTS[text](path) if text in ACTS else float(len(text)))
        return scores


class CannotBeLoaded(Hostile):
    def __setstate__(self, state):
        raise OSError("no such table")

    def __getstate__(self):
        return {"some": "state"}


class Fragile(Reward):
    name = "fragile"
    weight = 2.0
    required_columns = ("answer",)

    def score(self, batch):
        assert len(batch) == 1
        total = sum(batch.completion_ids[0])
        if total % EXITS == 0:
            raise SystemExit(total)
        while total % LOOPS == 0:
            pass
        return [total % 7 / 7]
