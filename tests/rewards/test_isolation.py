"""Rewards in worker processes: every way to go wrong is a failure of one completion, in time, and leaves nothing."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from drpo_lightning.errors import SettingError
from drpo_lightning.rewards import RewardBatch, RewardError, RewardFailure
from drpo_lightning.rewards.isolation import TAIL_BYTES, IsolatedScorer
from drpo_lightning.rewards.isolation_worker import WorkerLimits
from tests.rewards.hostile import CannotBeLoaded, Hostile

TIMEOUT_SECONDS = 1.0
MEMORY_BYTES = 2**30
ERRORS = {
    "raise": r"^raised KeyError: 'nothing there'$",
    "unspeakable": r"^made its worker process end: exit code 1$",
    "interrupt": r"^raised KeyboardInterrupt: $",
    "recurse": r"^raised RecursionError: ",
    "sys.exit": r"^raised SystemExit: 0$",
    "exit thread": r"end: exit code 7$",
    "os._exit": r"end: exit code 0$",
    "segfault": r"end: killed by signal 11 \(Segmentation fault\)$",
    "abort": r"end: killed by signal 6 \(Aborted\)$",
    "kill": r"end: killed by signal 9 \(Killed\)$",
    "memory": r"^raised MemoryError: ",
    "lambda": r"^returned <function .*, which is neither a finite float nor None$",
    "nan": r"^returned nan, which is neither",
    "inf": r"^returned inf, which is neither",
    "huge": r"^returned 1e\+300, which is neither",
    "text": r"^returned '1.0', which is neither",
    "two scores": r"^returned 2 scores for 1 completion$",
    "no list": r"^raised TypeError: 'float' object is not iterable",
    "close files": r"^made its worker process end: ",
    "write into files": r"^sent an answer that is none",
    "answer for another": r"^sent an answer that is none",
}
TIMEOUTS = ["stop", "loop", "loop with lock", "sleep", "flood", "children"]


def make_scorer(reward, num_workers=2, **limits):
    defaults = {
        "timeout_seconds": TIMEOUT_SECONDS,
        "start_timeout_seconds": 60.0,
        "memory_bytes": MEMORY_BYTES,
        "max_processes": None,
    }
    return IsolatedScorer(reward, num_workers=num_workers, limits=WorkerLimits(**(defaults | limits)))


@pytest.fixture(scope="module")
def scorer():
    """One for all tests: whatever happened to it in one, it is as good as new in the next."""
    scorer = make_scorer(Hostile())
    yield scorer
    scorer.close()


def batch(*completions, **columns):
    size = len(completions)
    return RewardBatch([""] * size, completions, [[1]] * size, ["stop"] * size, columns)


def is_running(pid):
    """False for a process that is gone, or waits to be reaped."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.05)


@pytest.mark.parametrize("act", ERRORS)
def test_what_goes_wrong_is_an_error_of_that_completion_alone(scorer, act):
    before, failure, *after = scorer.score(batch("a", act, "abc", "ab", "none"))
    assert (before, after) == (1.0, [3.0, 2.0, None])
    assert isinstance(failure, RewardFailure)
    assert failure.kind == "error"
    assert re.search(ERRORS[act], failure.reason), failure.reason


@pytest.mark.parametrize("act", TIMEOUTS)
def test_what_does_not_end_is_a_timeout_of_that_completion_alone(scorer, act):
    started = time.monotonic()
    before, failure, *after = scorer.score(batch("a", act, "abc", "ab"))
    assert (before, after) == (1.0, [3.0, 2.0])
    assert isinstance(failure, RewardFailure)
    assert failure.kind == "timeout"
    assert failure.reason.startswith("took longer than 1 s")
    assert TIMEOUT_SECONDS <= time.monotonic() - started < TIMEOUT_SECONDS + 20


def test_a_list_without_end_meets_the_memory_limit_or_the_clock(scorer):
    failure, after = scorer.score(batch("list without end", "abc"))
    assert isinstance(failure, RewardFailure)
    assert after == 3.0


def test_the_last_output_is_in_the_report_and_is_bounded(scorer):
    raised, flooded, looped, crashed = scorer.score(batch("raise", "flood", "loop with lock", "segfault"))
    assert "the act is raise" in raised.output
    assert "in raise_" in raised.output
    assert flooded.reason.endswith("s") or flooded.reason.endswith("writing without end")
    assert 0 < len(flooded.output) <= TAIL_BYTES
    assert "hostile.py" in looped.output, "says where it was when its time was over"
    assert "Segmentation fault" in crashed.output


def test_output_does_not_stand_in_the_way_of_a_score(scorer, capfd):
    assert scorer.score(batch("short flood", "a", "short flood")) == [0.5, 1.0, 0.5]
    assert capfd.readouterr() == ("", "")


def test_every_sample_has_its_own_output(scorer):
    outcomes = scorer.score(batch(*["raise"] * 6, "nan", "raise"))
    assert [outcome.output.count("the act is") for outcome in outcomes] == [1] * 8
    assert "the act is nan" in outcomes[6].output


def test_scores_come_in_the_order_of_the_completions(scorer):
    texts = ["x" * (7 * i % 23) for i in range(200)]
    assert scorer.score(batch(*texts)) == [float(len(text)) for text in texts]
    assert scorer.score(batch()) == []


def test_a_sample_larger_than_any_buffer_arrives(scorer):
    assert scorer.score(batch("x" * 10_000_000)) == [1e7]


def test_a_child_that_goes_on_as_the_worker_ends_and_does_not_answer_for_it(scorer, tmp_path):
    paths = [tmp_path / str(i) for i in range(5)]
    acts = ("fork", "fork", "a", "fork", "abc")
    assert scorer.score(batch(*acts, path=list(map(str, paths)))) == [0.25, 0.25, 1.0, 0.25, 3.0]
    children = [int(path.read_text()) for path in paths if path.exists()]
    assert len(children) == 3
    wait_until(lambda: not any(map(is_running, children)))


def test_children_of_a_worker_that_is_out_of_time_end_with_it(scorer, tmp_path):
    path = tmp_path / "pid"
    (failure,) = scorer.score(batch("child", path=[str(path)]))
    assert failure.kind == "timeout"
    wait_until(lambda: not is_running(int(path.read_text())))


def test_workers_stay_from_batch_to_batch(scorer):
    first, second = (set(scorer.score(batch(*["pid"] * 20))) for _ in range(2))
    assert len(first | second) <= 2
    assert os.getpid() not in first


def pids_of(scorer, who):
    return {int(pid) for pid in scorer.score(batch(*[who] * 10))}


def kill_and_wait(pids):
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not any(map(is_running, pids)))


def test_a_worker_that_died_in_between_costs_no_sample(scorer):
    kill_and_wait(pids_of(scorer, "pid"))
    assert scorer.score(batch("a", "ab", "abc", "abcd")) == [1.0, 2.0, 3.0, 4.0]


def test_a_keeper_that_died_is_replaced_together_with_its_worker(scorer):
    orphans = pids_of(scorer, "pid")
    kill_and_wait([pids_of(scorer, "parent pid").pop()])
    first, second, *others = scorer.score(batch("loop", "loop with lock", "abc", "abcd"))
    assert (first.kind, second.kind, others) == ("timeout", "timeout", [3.0, 4.0])
    assert not any(map(is_running, orphans))


def test_limits_are_in_force_and_closing_ends_the_processes():
    scorer = make_scorer(Hostile(), num_workers=1, max_processes=12_345)
    memory, processes, pid, parent = scorer.score(batch("memory limit", "process limit", "pid", "parent pid"))
    assert MEMORY_BYTES < memory < MEMORY_BYTES + 2**36
    assert processes == 12_345
    scorer.close()
    assert not is_running(int(pid))
    assert not is_running(int(parent))
    scorer.close()


def test_a_reward_that_cannot_be_loaded_says_why():
    scorer = make_scorer(CannotBeLoaded(), num_workers=1)
    with pytest.raises(
        RewardError, match=r"'hostile' cannot be loaded in a worker process: raised OSError: no such table"
    ):
        scorer.score(batch("a"))


def test_a_reward_that_does_not_load_in_time_says_so():
    scorer = make_scorer(Hostile(), num_workers=1, start_timeout_seconds=0.2)
    with pytest.raises(RewardError, match=r"its process ended or did not answer within 0.2 s"):
        scorer.score(batch("a"))


def test_a_reward_that_cannot_be_pickled_says_why():
    reward = Hostile()
    reward.function = lambda: 0
    with pytest.raises(SettingError, match=r"the reward 'hostile' cannot be pickled, .*lambda.*at the top of a module"):
        make_scorer(reward)


PROGRAM = """
import os
import sys
import time
from drpo_lightning.rewards import RewardBatch
from drpo_lightning.rewards.isolation import IsolatedScorer
from drpo_lightning.rewards.isolation_worker import WorkerLimits
from tests.rewards.hostile import Hostile

if __name__ == "__main__":
    scorer = IsolatedScorer(Hostile(), num_workers=1, limits=WorkerLimits(1000.0, 60.0, None, None))
    scorer.start()
    trainer = os.getpid()
    if os.fork() == 0:  # has inherited whatever the trainer holds, and outlives it
        os.setpgid(0, 0)
        while os.getppid() == trainer:
            time.sleep(0.1)
        time.sleep(5)
        os._exit(0)
    scorer.score(RewardBatch([""], ["say pid"], [[1]], ["stop"], {"path": [sys.argv[1]]}))
"""


@pytest.fixture
def start_trainer(tmp_path):
    """Starts a program whose reward holds the lock of its interpreter; returns it and the file of its children."""
    program, programs = tmp_path / "program.py", []
    program.write_text(PROGRAM)

    def start(name):
        command = [sys.executable, program, tmp_path / name]
        environment = os.environ | {"PYTHONPATH": os.getcwd()}
        with (tmp_path / f"{name}.errors").open("w") as errors:
            programs.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stderr=errors,
                    start_new_session=True,
                    # A job in the background is started with Ctrl-C ignored, and hands that on.
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                )
            )
        return programs[-1], tmp_path / name

    yield start
    for trainer in programs:
        trainer.kill()
        trainer.wait()


def test_a_worker_that_holds_its_lock_ends_with_the_trainer(start_trainer):
    started = {end: start_trainer(end.name) for end in (signal.SIGKILL, signal.SIGINT)}
    for end, (trainer, path) in started.items():
        wait_until(lambda path=path: path.exists() and path.read_text().count(" "), 60)
        pids = [int(pid) for pid in path.read_text().split()]
        assert all(map(is_running, pids))
        os.killpg(trainer.pid, end)  # as a Ctrl-C in the terminal does
        trainer.wait(timeout=30)
        wait_until(lambda pids=pids: not any(map(is_running, pids)), 4)
        if end == signal.SIGINT:
            errors = path.with_suffix(".errors").read_text()
            assert errors.count("Traceback") == 1, "the trainer's own"
            assert "KeyboardInterrupt" in errors
