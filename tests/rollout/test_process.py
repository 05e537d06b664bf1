"""Calls into another process: results, errors, death, time-outs, and the parent's end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from drpo_lightning.rollout import EngineError
from drpo_lightning.rollout.process import EngineProcess

ROOT = Path(__file__).parents[2]


def failing(greeting: str) -> None:
    raise LookupError(f"{greeting} failed to start")


class Recorder:
    """Stands in the child for an engine."""

    def __init__(self, greeting: str) -> None:
        self.greeting = greeting
        self.weights: dict[str, torch.Tensor] = {}

    def greet(self, name: str) -> str:
        return f"{self.greeting} {name}"

    def pid(self) -> int:
        return os.getpid()

    def variable(self, name: str) -> str | None:
        return os.environ.get(name)

    def fail(self) -> None:
        raise LookupError("nothing there")

    def die(self) -> None:
        os._exit(3)

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def load_weights(self, weights) -> None:
        self.weights = dict(weights)

    def loaded(self) -> dict[str, list]:
        return {name: [str(tensor.dtype), tensor.double().tolist()] for name, tensor in self.weights.items()}

    def close(self) -> None:
        pass


@pytest.fixture
def process():
    process = EngineProcess(Recorder, ("hello",), {"DRPO_TEST_VARIABLE": "set"}, bucket_bytes=256)
    yield process
    process.close()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0] != "Z"


def gone_within(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not is_alive(pid):
            return True
        time.sleep(0.1)
    return False


def test_a_call_runs_in_the_other_process(process):
    assert process.call("greet", "you", timeout_seconds=60) == "hello you"
    assert process.call("pid", timeout_seconds=60) == process.pid != os.getpid()


def test_the_environment_is_the_childs_alone(process):
    assert process.call("variable", "DRPO_TEST_VARIABLE", timeout_seconds=60) == "set"
    assert "DRPO_TEST_VARIABLE" not in os.environ


def test_an_exception_arrives_with_its_traceback_and_the_process_lives_on(process):
    with pytest.raises(EngineError, match=r"(?s)`fail` failed in the engine's process.*LookupError: nothing there"):
        process.call("fail", timeout_seconds=60)
    assert process.call("greet", "you", timeout_seconds=60) == "hello you"


def test_death_is_noticed_at_once(process):
    process.call("pid", timeout_seconds=60)
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"died \(exit code 3\)"):
        process.call("die", timeout_seconds=60)
    assert time.monotonic() - started < 10
    with pytest.raises(EngineError, match="died"):
        process.call("greet", "you", timeout_seconds=60)


def test_no_answer_in_time_ends_the_process(process):
    process.call("pid", timeout_seconds=60)
    pid = process.pid
    with pytest.raises(EngineError, match=r"did not answer `wait` within 0\.5 s and was ended"):
        process.call("wait", 60.0, timeout_seconds=0.5)
    assert gone_within(pid, 10)


def test_weights_arrive_complete_through_a_buffer_smaller_than_them(process):
    weights = {
        "matrix": torch.arange(48.0).view(6, 8),
        "half": torch.arange(7.0).bfloat16(),
        "empty": torch.zeros(0),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "transposed": torch.arange(12.0).view(3, 4).T,
        "integers": torch.arange(5),
    }
    process.load_weights(weights.items(), timeout_seconds=60)
    loaded = process.call("loaded", timeout_seconds=60)
    assert loaded == {name: [str(tensor.dtype), tensor.double().tolist()] for name, tensor in weights.items()}
    assert list(loaded) == list(weights)


def test_an_object_that_cannot_be_built_is_the_answer_to_the_first_call():
    process = EngineProcess(failing, ("hello",), {}, bucket_bytes=256)
    with pytest.raises(EngineError, match=r"(?s)`greet` failed.*LookupError: hello failed to start"):
        process.call("greet", "you", timeout_seconds=60)
    process.close()


def test_a_program_that_forgets_to_close_ends_all_the_same():
    script = (
        "from drpo_lightning.rollout.process import EngineProcess\n"
        "from tests.rollout.test_process import Recorder\n"
        "if __name__ == '__main__':\n"
        "    process = EngineProcess(Recorder, ('hello',), {}, 256)\n"
        "    print(process.call('pid', timeout_seconds=60), flush=True)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120, check=True
    )
    assert gone_within(int(result.stdout), 10)


def test_closing_ends_the_process(process):
    process.call("pid", timeout_seconds=60)
    pid = process.pid
    process.close()
    assert gone_within(pid, 10)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_the_process_ends_when_its_parent_is_killed(sent):
    # vLLM by itself leaves its processes behind for ever.
    script = (
        "import time\n"
        "from drpo_lightning.rollout.process import EngineProcess\n"
        "from tests.rollout.test_process import Recorder\n"
        "if __name__ == '__main__':\n"
        "    process = EngineProcess(Recorder, ('hello',), {}, 256)\n"
        "    print(process.call('pid', timeout_seconds=60), flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.send_signal(sent)
        parent.wait(timeout=30)
    assert gone_within(pid, 10)
