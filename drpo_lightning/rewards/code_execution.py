"""Programs that the policy wrote, run against tests: in processes of their own, with limits. Not a sandbox."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drpo_lightning.errors import SettingError
from drpo_lightning.rewards.base import Reward, RewardBatch
from drpo_lightning.rewards.code_cases import CodeCase, code_cases, python_block

NAMESPACES = ("unshare", "--user", "--map-current-user", "--net", "--ipc", "--pid", "--fork", "--kill-child", "--")
"""A user, network, IPC and process namespace for a command; takes no root where the system lets users have them."""

RUNNER = """
import ctypes, json, os, resource, signal, sys, types

def start():
    folder, limits, mark = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    os.setsid()
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with who started it
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))
    os.set_inheritable(mark, False)
    sys.argv[:] = ["program.py"]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    sources = {}
    for file in ("program.py", "test.py"):
        with open(os.path.join(folder, file), encoding="utf-8") as source:
            sources[file] = source.read()
        os.remove(source.name)
    run, compiled, write = exec, compile, os.write  # what the program makes of these names is its own affair
    for file, text in sources.items():
        run(compiled(text, file, "exec"), main.__dict__)
    write(mark, b".")

start()
"""
"""Limits itself, runs program and test as a module of their own, and marks that they came to their end."""


@dataclass(frozen=True)
class ProgramLimits:
    """What a program may take in one case.

    Args:
        seconds: by the clock; its processor time is bounded a second later.
        memory_bytes: address space of each of its processes.
        max_processes: processes and threads in its namespaces; of no effect without them, and for root.
        file_bytes: length of each file that it writes, and of its output.
        max_open_files: that each of its processes has open.
        namespaces: runs it in `NAMESPACES`.
    """

    seconds: float
    memory_bytes: int
    max_processes: int = 64
    file_bytes: int = 2**20
    max_open_files: int = 64
    namespaces: bool = True

    def resource_limits(self) -> dict[str, int]:
        """Values for `resource.setrlimit` by name."""
        return {
            "RLIMIT_CPU": math.ceil(self.seconds) + 1,
            "RLIMIT_AS": self.memory_bytes,
            "RLIMIT_FSIZE": self.file_bytes,
            "RLIMIT_NOFILE": self.max_open_files,
            "RLIMIT_CORE": 0,
        } | ({"RLIMIT_NPROC": self.max_processes} if self.namespaces else {})


def check_namespaces() -> None:
    """Tries whether this machine lets a user have namespaces.

    Raises:
        SettingError: if it does not.
    """
    try:
        result = subprocess.run([*NAMESPACES, "true"], capture_output=True, text=True, timeout=30, check=False)
    except OSError as error:
        reason = str(error)
    else:
        if result.returncode == 0:
            return
        reason = result.stderr.strip()
    raise SettingError(
        f"`namespaces` cannot be had on this machine: {reason}. Allow users to make them (in Docker by `--security-opt "
        "seccomp=unconfined`), or set `namespaces: false`: programs then have the network, may send signals to the "
        "trainer, and may leave processes behind"
    )


def passes(program: str, case: CodeCase, limits: ProgramLimits) -> bool:
    """True if a program passes a test: it ends by itself, in time, with status 0, and writes what it should.

    Outputs are compared without white space at the ends of lines and empty lines at the end.

    Args:
        program: in Python.
        case: the test.
        limits: what the program may take.
    """
    with (
        tempfile.TemporaryDirectory(prefix="drpo-code-", ignore_cleanup_errors=True) as name,
        tempfile.TemporaryFile() as mark,
    ):
        folder = Path(name)
        (folder / "work").mkdir()
        for file, text in (("program.py", program), ("test.py", case.test), ("input", case.input)):
            (folder / file).write_text(text, encoding="utf-8", errors="surrogatepass")
        status = _run(folder, mark.fileno(), limits)
        output = (folder / "output").read_text(encoding="utf-8", errors="replace")
        # A program that is only to write may exit where it likes.
        has_ended = status == 0 and (not case.test or os.path.getsize(mark.fileno()) > 0)
    return has_ended and (case.output is None or _lines(output) == _lines(case.output))


def _run(folder: Path, mark: int, limits: ProgramLimits) -> int | None:
    """Runs the program in an empty folder, with an environment of its own; its exit status, None if it is late.

    Program and test write to the open file `mark` once they have come to their end.
    """
    arguments = [str(folder), json.dumps(limits.resource_limits()), str(mark)]
    environment = {"PATH": os.defpath, "HOME": str(folder / "work"), "TMPDIR": str(folder / "work"), "LANG": "C.UTF-8"}
    with (folder / "input").open("rb") as given, (folder / "output").open("wb") as written:
        process = subprocess.Popen(
            [*(NAMESPACES if limits.namespaces else ()), sys.executable, "-I", "-B", "-c", RUNNER, *arguments],
            stdin=given,
            stdout=written,
            stderr=subprocess.DEVNULL,
            pass_fds=(mark,),
            cwd=folder / "work",
            env=environment | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        )
        try:
            return process.wait(limits.seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            process.kill()
            with contextlib.suppress(ProcessLookupError):  # without namespaces: what it has left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


class CodeAnswer(Reward):
    """The share of a row's tests that the completion's program passes, or 1 for all and 0 for less.

    Args:
        column: column of the data set that holds the tests, see `code_cases`.
        partial_credit: gives the share.
        seconds: for all tests of a completion; those that it leaves no time for are not passed.
        limits: of each test.
        name: see `Reward`.
        weight: see `Reward`.
    """

    def __init__(
        self, column: str, *, partial_credit: bool, seconds: float, limits: ProgramLimits, name: str, weight: float
    ) -> None:
        self.column = column
        self.partial_credit = partial_credit
        self.seconds = seconds
        self.limits = limits
        self.name = name
        self.weight = weight
        self.required_columns = (column,)

    def score(self, batch: RewardBatch) -> Sequence[float | None]:
        """See the class; 0 without a program."""
        pairs = zip(batch.completions, batch.column(self.column), strict=True)
        return [self._score(python_block(completion), code_cases(tests)) for completion, tests in pairs]

    def _score(self, program: str | None, cases: list[CodeCase]) -> float:
        if program is None:
            return 0.0
        deadline = time.monotonic() + self.seconds
        passed = 0
        for case in cases:
            if time.monotonic() < deadline and passes(program, case, self.limits):
                passed += 1
            elif not self.partial_credit:
                return 0.0
        return passed / len(cases)
