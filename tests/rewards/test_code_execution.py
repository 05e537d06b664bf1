"""Programs that are right, wrong, late, greedy, or leave early, run for real."""

import dataclasses
import os
import socket
import subprocess
import time

import pytest

from drpo_lightning.errors import SettingError
from drpo_lightning.rewards import code_execution
from drpo_lightning.rewards.code_cases import CodeCase
from drpo_lightning.rewards.code_execution import ProgramLimits, check_namespaces, passes

try:
    check_namespaces()
    HAS_NAMESPACES = True
except SettingError:
    HAS_NAMESPACES = False
LIMITS = ProgramLimits(seconds=5.0, memory_bytes=2**30, namespaces=HAS_NAMESPACES)
TEST = CodeCase(test="assert f(1) == 2")
SUM = CodeCase(input="1 2\n", output="3\n")
SAYS = """import os, re
def say(value):
    if re.fullmatch(r"\\w{16,}", str(value)):
        os.write(1, str(value).encode())
"""
"""Repeats what may be a secret."""
needs_namespaces = pytest.mark.skipif(not HAS_NAMESPACES, reason="this machine does not let users have namespaces")


@pytest.mark.parametrize(
    ("program", "case"),
    [
        ("def f(x): return x + 1", TEST),
        ("print(sum(map(int, input().split())))", SUM),
        ("print('3  \\n\\n')", SUM),
        ("import sys\nprint(3)\nsys.exit()", SUM),
        ("if __name__ == '__main__':\n    print(3)", SUM),
        ("print('\u00e9')", CodeCase(output="\u00e9")),
        ("from __future__ import annotations\ndef f(x: nothing): return x + 1", TEST),
        ("import dataclasses, pickle\n@dataclasses.dataclass\nclass A:\n    x: 'int'\n"
         "def f(x): return pickle.loads(pickle.dumps(A(x))).x + 1", TEST),
        ("open('a', 'w').write('3')\nprint(open('a').read())", SUM),
        ("from re import *\ndef f(x): return x + 1", TEST),
        ("compile = 3\nexec = os = sys = main = start = None\ndef f(x): return x + 1", TEST),
        ("import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer)\nprint(3)", SUM),
        ("import sys\nsys.stdout = None\ndef f(x): return x + 1", TEST),
        ("import os, sys\nassert not os.listdir() and len(sys.argv) == 1\nprint(3)", SUM),
    ],
)  # fmt: skip
def test_a_program_that_is_right_passes(program, case):
    assert passes(program, case, LIMITS)


@pytest.mark.parametrize(
    ("program", "case"),
    [
        ("def f(x): return x", TEST),
        ("", TEST),
        ("def f(x: return", TEST),
        ("print(4)", SUM),
        ("print(3, 3)", SUM),
        ("print(3)\nraise ValueError", SUM),
        ("print(3)\nimport os\nos._exit(1)", SUM),
        ("def f(x): return x + 1\nimport sys\nsys.exit(0)", TEST),
        ("import os\nos._exit(0)", TEST),
        ("def exec(*_): pass", TEST),
        ("exec = print", TEST),
        ("import builtins\nbuiltins.exec = builtins.compile = print", TEST),
        (f"import sys\n{SAYS}for value in sys._getframe(1).f_locals.values(): say(value)\nos._exit(0)", TEST),
        (f"{SAYS}for word in open('/proc/self/cmdline').read().split(chr(0)): say(word)\nos._exit(0)", TEST),
        ("import os\nos.kill(os.getpid(), 9)", SUM),
        ("import ctypes\nctypes.string_at(0)", SUM),
    ],
)
def test_a_program_that_is_wrong_or_leaves_before_the_test_does_not(program, case):
    assert not passes(program, case, LIMITS)


@pytest.mark.parametrize(
    "program",
    [
        "a = bytearray(2**31)\nprint(3)",
        "print(3 * 'x' * 2**21)",
        "open('a', 'wb').write(bytes(2**21))\nprint(3)",
        "files = [open('/dev/null') for _ in range(100)]\nprint(3)",
        "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))\n"
        "files = [open('/dev/null') for _ in range(100)]\nprint(3)",
    ],
)
def test_memory_output_and_files_are_limited(program):
    if "setrlimit" in program and os.getuid() == 0 and not HAS_NAMESPACES:
        pytest.skip("root may raise its limits")
    assert not passes(program, SUM, LIMITS)


@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(60)", "input()\ninput()"])
def test_a_program_has_its_time(program):
    start = time.monotonic()
    assert not passes(program, SUM, dataclasses.replace(LIMITS, seconds=0.3))
    assert time.monotonic() - start < 5


def test_nothing_of_the_trainers_environment_is_handed_on(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "sesame")
    program = "import os\nprint(os.environ.get('SECRET_TOKEN'), os.environ['HOME'] == os.getcwd())"
    assert passes(program, CodeCase(output="None True"), LIMITS)


@needs_namespaces
def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 1)\nprint(3)"
        assert not passes(program, SUM, LIMITS)
        assert passes(program, SUM, dataclasses.replace(LIMITS, namespaces=False))


@needs_namespaces
def test_what_a_program_starts_ends_with_it():
    mark = f"7654.{os.getpid()}1"
    program = f"import subprocess\nsubprocess.Popen(['sleep', '{mark}'], start_new_session=True)\nprint(3)"
    assert passes(program, SUM, LIMITS)
    assert mark not in _commands()


def test_without_namespaces_its_process_group_ends_with_it():
    mark = f"7654.{os.getpid()}2"
    program = f"import subprocess\nsubprocess.Popen(['sleep', '{mark}'])\nprint(3)"
    assert passes(program, SUM, dataclasses.replace(LIMITS, namespaces=False))
    deadline = time.monotonic() + 5
    while mark in _commands() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert mark not in _commands()


def _commands():
    return subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout


def test_a_machine_without_namespaces_is_named(monkeypatch):
    monkeypatch.setattr(code_execution, "NAMESPACES", ("no-such-program",))
    with pytest.raises(
        SettingError, match=r"`namespaces` cannot be had .*no-such-program.* or set `namespaces: false`"
    ):
        check_namespaces()
    monkeypatch.setattr(code_execution, "NAMESPACES", ("sh", "-c", "echo not permitted >&2; exit 1"))
    with pytest.raises(SettingError, match="not permitted"):
        check_namespaces()
