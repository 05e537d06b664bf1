"""Calls into another process: results, errors, death, hangs, and the parent's end."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from drpo_lightning.rollout import EngineError
from drpo_lightning.rollout.process import EngineProcess
from drpo_lightning.rollout.served import Heartbeat

ROOT = Path(__file__).parents[2]


def failing(greeting: str) -> None:
    raise LookupError(f"{greeting} failed to start")


class Recorder:
    """Stands in the child for an engine."""

    def __init__(self, greeting: str, heartbeat: Heartbeat | None = None) -> None:
        self.greeting = greeting
        self.heartbeat = heartbeat
        self.weights: dict[str, torch.Tensor] = {}
        self.steps_left: float = 0

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

    def beat(self, times: int, seconds: float) -> None:
        for _ in range(times):
            time.sleep(seconds)
            self.heartbeat.beat()

    def say(self, text: str) -> None:
        sys.stdout.write(f"{text}\n")
        os.write(2, b"from native code\n")

    def crash(self) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def run_out_of_memory(self) -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
        torch.ones(2**32)

    def begin(self, steps: float) -> None:
        self.steps_left = steps

    def work(self) -> bool:
        if self.steps_left:
            self.steps_left -= 1
            self.heartbeat.beat()
            if self.steps_left < 0:
                self.steps_left = 0
                raise LookupError("lost its way")
        return self.steps_left > 0

    def start_child(self) -> int:
        return subprocess.Popen(["sleep", "60"]).pid

    def close(self) -> None:
        pass


@pytest.fixture
def process():
    heartbeat = Heartbeat()
    process = EngineProcess(Recorder, ("hello", heartbeat), {"DRPO_TEST_VARIABLE": "set"}, 256, heartbeat)
    yield process
    process.close()


def shared_memory() -> set[str]:
    """Names of the shared memory of this machine, and of its semaphores."""
    return {path.name for path in Path("/dev/shm").iterdir()}


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


def test_work_goes_on_between_calls_until_it_is_done(process):
    process.call("begin", 1000, timeout_seconds=60)
    while process._heartbeat.count < 1000:
        time.sleep(0.01)
    assert process.call("greet", "you", timeout_seconds=60) == "hello you"
    assert process._heartbeat.count == 1000


def test_work_without_an_end_keeps_nobody_waiting(process):
    process.call("begin", float("inf"), timeout_seconds=60)
    assert process.call("greet", "you", timeout_seconds=60) == "hello you"
    process.load_weights([("a", torch.ones(3))], timeout_seconds=60)
    assert process.call("loaded", timeout_seconds=60) == {"a": ["torch.float32", [1.0, 1.0, 1.0]]}
    pid = process.pid
    process.close()
    assert not is_alive(pid)


def test_what_goes_wrong_between_calls_is_the_answer_to_the_next(process):
    process.call("begin", -1, timeout_seconds=60)
    with pytest.raises(EngineError, match=r"(?s)`greet` failed in the engine's process.*LookupError: lost its way"):
        process.call("greet", "you", timeout_seconds=60)
    process.call("begin", 0, timeout_seconds=60)
    assert process.call("greet", "you", timeout_seconds=60) == "hello you"


def test_what_goes_wrong_between_calls_is_the_answer_to_new_weights(process):
    process.call("begin", -1, timeout_seconds=60)
    with pytest.raises(
        EngineError, match=r"(?s)`load_weights` failed in the engine's process.*LookupError: lost its w"
    ):
        process.load_weights([("a", torch.ones(3))], timeout_seconds=60)


def test_death_is_noticed_at_once(process):
    process.call("pid", timeout_seconds=60)
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"died \(exit code 3\)"):
        process.call("die", timeout_seconds=60)
    assert time.monotonic() - started < 3
    with pytest.raises(EngineError, match="died"):
        process.call("greet", "you", timeout_seconds=60)


def test_no_answer_in_time_ends_the_process(process):
    process.call("pid", timeout_seconds=60)
    pid = process.pid
    with pytest.raises(EngineError, match=r"did not answer `wait` within 0\.5 s and was ended"):
        process.call("wait", 60.0, timeout_seconds=0.5)
    assert gone_within(pid, 10)


def test_a_stopped_process_is_noticed_also_when_it_does_not_take_the_question(process):
    process.call("pid", timeout_seconds=60)
    pid = process.pid
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(EngineError, match=r"did not answer `greet` within 0\.5 s and was ended"):
        process.call("greet", "x" * 2**22, timeout_seconds=0.5)
    assert time.monotonic() - started < 5
    assert gone_within(pid, 10)


def test_a_process_that_makes_no_progress_is_noticed_long_before_its_time_is_over(process, capfd):
    process.call("pid", timeout_seconds=60)
    process.call("beat", 6, 0.3, timeout_seconds=60, stall_timeout_seconds=1.0)
    started = time.monotonic()
    with pytest.raises(EngineError) as error:
        process.call("wait", 60.0, timeout_seconds=60, stall_timeout_seconds=1.0)
    assert 1 < time.monotonic() - started < 5
    assert "made no progress in `wait` for 1 s and was ended" in str(error.value)
    assert "in wait\n" in str(error.value), "the stack of the main thread"
    assert "in wait\n" in capfd.readouterr().err


def test_an_error_shows_the_last_that_the_process_printed_and_its_cause_of_death(process, capfd):
    process.call("say", "from Python", timeout_seconds=60)
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(EngineError) as error:
        process.call("greet", "you", timeout_seconds=60)
    assert "died (killed by SIGKILL, as the kernel does when memory runs out) in `greet`" in str(error.value)
    assert str(error.value).endswith("Its last output:\nfrom Python\nfrom native code")
    assert capfd.readouterr().err == "from Python\nfrom native code\n"


def test_a_crash_shows_where(process, capfd):
    with pytest.raises(EngineError, match=r"(?s)killed by SIGSEGV\) in `crash`.*Segmentation fault.*in crash\n"):
        process.call("crash", timeout_seconds=60)
    capfd.readouterr()


def test_without_memory_the_call_fails(process):
    with pytest.raises(EngineError, match="allocate memory"):
        process.call("run_out_of_memory", timeout_seconds=60)


def test_when_memory_runs_out_the_kernel_takes_the_engine_first(process):
    process.call("pid", timeout_seconds=60)
    assert Path(f"/proc/{process.pid}/oom_score_adj").read_text() == "500\n"


def test_what_the_process_has_started_ends_with_it(process):
    grandchild = process.call("start_child", timeout_seconds=60)
    assert is_alive(grandchild)
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="died"):  # although the grandchild has its pipes open
        process.call("greet", "you", timeout_seconds=60)
    assert gone_within(grandchild, 10)


def test_a_process_at_work_is_closed_at_once(process):
    def ctrl_c(*_):
        raise KeyboardInterrupt

    process.call("pid", timeout_seconds=60)
    pid = process.pid
    signal.signal(signal.SIGALRM, ctrl_c)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        process.call("wait", 60.0, timeout_seconds=60)
    process.close()
    assert time.monotonic() - started < 3
    assert not is_alive(pid)


def test_weights_that_break_off_leave_a_process_that_can_be_closed(process):
    def weights():
        yield "a", torch.zeros(40)
        yield "b", torch.zeros(40)
        raise LookupError("no third tensor")

    with pytest.raises(LookupError):
        process.load_weights(weights(), timeout_seconds=60)
    pid = process.pid
    process.close()
    assert not is_alive(pid)


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


@pytest.mark.parametrize(
    ("sent", "state"),
    [
        (signal.SIGTERM, "idle"),
        (signal.SIGKILL, "idle"),
        (signal.SIGKILL, "starting"),
        (signal.SIGKILL, "stopped"),
    ],
)
def test_the_process_ends_when_its_parent_is_killed(sent, state):
    # vLLM by itself leaves its processes behind for ever.
    script = (
        "import os, signal, time\n"
        "from drpo_lightning.rollout.process import EngineProcess\n"
        "from tests.rollout.test_process import Recorder\n"
        "if __name__ == '__main__':\n"
        "    process = EngineProcess(Recorder, ('hello',), {}, 256)\n"
        f"    if {state!r} != 'starting':\n"
        "        process.call('pid', timeout_seconds=60)\n"
        f"    if {state!r} == 'stopped':\n"
        "        os.kill(process.pid, signal.SIGSTOP)\n"
        "    print(process.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    before = shared_memory()
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.send_signal(sent)
        parent.wait(timeout=30)
    assert gone_within(pid, 30)
    assert not {name for name in shared_memory() - before if str(parent.pid) in name or str(pid) in name}
