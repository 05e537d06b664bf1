"""vLLM in its own process dies, hangs or runs out of memory, or its trainer does: nothing is lost, nothing is left."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

pytestmark = pytest.mark.reliability

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 600
TIMEOUTS = {"stall_timeout_seconds": 10, "sync_timeout_seconds": 10}


class Run:
    """A run in a process of its own, whose processes and shared memory can be found after its end."""

    def __init__(self, folder, **arguments):
        self.folder = folder
        self.marker = f"DRPO_TEST_RUN={uuid.uuid4()}"
        name, value = self.marker.split("=")
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "printed"
        with self.log.open("w") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.reliability.engine_runs",
                    json.dumps({"folder": str(folder)} | arguments),
                ],
                cwd=ROOT,
                env=os.environ | {name: value, "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=output,
                start_new_session=True,
                # Tests that run in the background are started with Ctrl-C ignored, and would hand that on.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def processes(self):
        """Ids of the processes that belong to the run and are no zombies."""
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.marker.encode() in (folder / "environ").read_bytes():
                    found.add(int(folder.name))
            except OSError:
                continue
        return found

    def shared_memory(self):
        """Inodes of the shared memory that processes of the run have mapped, also of what has no name any more."""
        found = set()
        for pid in self.processes():
            try:
                lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            except OSError:
                continue
            found |= {int(line.split()[4]) for line in lines if " /dev/shm/" in line}
        return found

    def wait_for(self, is_so, seconds=120):
        """Waits until something is so, while the run goes on."""
        deadline = time.monotonic() + seconds
        while not is_so():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.1)

    def wait(self):
        """The exit status."""
        try:
            return self.process.wait(timeout=TIMEOUT_SECONDS)
        finally:
            self.process.kill()

    def reports(self):
        """What each rank wrote at the end."""
        assert self.wait() == 0, self.log.read_text()[-5000:]
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("report*.json"))]

    def check_nothing_is_left(self, shared_memory=frozenset(), seconds=15):
        """Waits for the last process to go; the shared memory that it had must go, too."""
        started = time.monotonic()
        while left := self.processes():
            assert time.monotonic() < started + seconds, f"processes are left: {left}"
            time.sleep(0.1)
        files = [path for path in Path("/dev/shm").iterdir() if path.stat().st_ino in shared_memory]
        assert not files, f"shared memory is left: {files}"
        sys.stdout.write(f"nothing is left {time.monotonic() - started:.1f} s after the trainer's end\n")


@pytest.fixture
def run(tmp_path):
    """Starts a run; ends it if the test does not."""
    runs = []

    def start(**arguments):
        runs.append(Run(tmp_path / str(len(runs)), **arguments))
        return runs[-1]

    yield start
    for started in runs:
        started.process.kill()
        for pid in started.processes():
            os.kill(pid, signal.SIGKILL)


def check_same(harmed, unharmed):
    """What was sampled and what was learned is the same, bit for bit."""
    for ours, theirs in zip(harmed, unharmed, strict=True):
        assert ours["completions"] == theirs["completions"]
        assert ours["weights"] == theirs["weights"]
        durations = [text for text in ours["warned"] if "weights again" in text]
        sys.stdout.write(f"{ours['num_restarts']} restarts, noticed: {ours['noticed_seconds']}; {durations}\n")


def test_a_run_whose_engine_dies_and_hangs_is_the_same_as_one_whose_engine_does_not(run):
    unharmed = run(num_rollouts=5, **TIMEOUTS)
    unharmed.reports()
    unharmed.check_nothing_is_left()
    accidents = {
        "sync 1": "kill",  # second rollout
        "generate 3": "kill",
        "generate 6": "stop",  # third, whose engine is found dead
        "sync 7": "stop",  # fourth, and while it is started again
        "start 5": "kill",
    }
    harmed = run(num_rollouts=5, accidents=[accidents], action="kill", **TIMEOUTS)
    check_same(harmed.reports(), unharmed.reports())
    (report,) = harmed.reports()
    assert report["num_restarts"] == 6
    for name, seconds in report["noticed_seconds"].items():
        assert seconds < (15 if "stop" in name else 2), name
    assert len(report["noticed_seconds"]) == len(accidents)
    harmed.check_nothing_is_left()


def test_an_engine_that_runs_out_of_memory_is_restarted(run):
    harmed, unharmed = run(accidents=[{"generate 3": "memory"}]), run()
    check_same(harmed.reports(), unharmed.reports())
    (report,) = harmed.reports()
    assert report["num_restarts"] == 1
    assert any("MemoryError" in text and "The engine is started again (1 of" in text for text in report["warned"])


def test_failures_in_a_row_end_the_run_with_the_engines_own_last_lines(run):
    harmed = run(accidents=[{"generate 3": "kill", "generate 4": "kill"}], max_restarts=1)
    assert harmed.wait() == 1
    message = harmed.log.read_text().rpartition("EngineError: ")[2]
    assert "the engine failed 2 times in a row; at last the engine's process died (killed by SIGKILL" in message
    assert "Its last output:\n" in message
    harmed.check_nothing_is_left()


@pytest.mark.parametrize(
    ("settings", "accidents"),
    [
        ({"strategy": "ddp"}, [{}, {"generate 3": "kill"}]),
        ({"strategy": "fsdp2", "shared": True}, [{"sync 1": "kill", "generate 3": "kill"}, {}]),
    ],
    ids=["ddp", "fsdp2_shared"],
)
def test_the_engine_of_one_rank_dies_and_all_go_on(run, settings, accidents):
    unharmed = run(devices=2, **settings).reports()
    harmed = run(devices=2, accidents=accidents, **settings)
    check_same(harmed.reports(), unharmed)
    assert [report["num_restarts"] for report in harmed.reports()] == [sum(map(len, accidents))] * 2
    harmed.check_nothing_is_left()


def prompts_of_all_ranks(run):
    """Of each rollout; which rank has which depends on their lengths."""
    by_rank = [report["prompts"] for report in run.reports()]
    return [sorted(prompt for prompts in parts for prompt in prompts) for parts in zip(*by_rank, strict=True)]


def test_engines_that_sample_ahead_are_restarted_and_asked_again(run):
    accidents = [{"sync 2": "kill"}, {"collect 1": "kill", "collect 3": "stop"}]
    harmed = run(devices=2, strategy="ddp", num_rollouts=5, max_staleness=1, accidents=accidents, **TIMEOUTS)
    unharmed = run(devices=2, strategy="ddp", num_rollouts=5)
    assert prompts_of_all_ranks(harmed) == prompts_of_all_ranks(unharmed)
    for ours in harmed.reports():
        assert ours["num_restarts"] == 3
        assert [len(samples) for samples in ours["completions"]] == [8] * 5
        assert all(max(samples) <= min(i, 1) for i, samples in enumerate(ours["staleness"]))
        assert max(map(max, ours["staleness"])) == 1
    harmed.check_nothing_is_left()


@pytest.mark.parametrize("moment", ["start", "rollouts"])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, "exception"])
def test_nothing_is_left_whatever_ends_the_trainer(run, moment, end):
    if end == "exception" and moment == "start":
        pytest.skip("the callback acts in the second rollout")
    started = run(num_rollouts=1000, action=end if end == "exception" else None)
    shared_memory = set()
    if end != "exception":
        if moment == "start":
            started.wait_for(lambda: len(started.processes()) > 2)  # trainer, resource tracker, engine
            time.sleep(4)
        else:
            started.wait_for((started.folder / "rollout3").exists)
        shared_memory = started.shared_memory()
        started.process.send_signal(end)
    started.wait()
    assert shared_memory or moment == "start" or end == "exception"
    started.check_nothing_is_left(shared_memory)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, "exception"])
def test_nothing_is_left_of_what_is_sampled_ahead(run, end):
    started = run(num_rollouts=1000, max_staleness=2, action=end if end == "exception" else None)
    if end != "exception":
        started.wait_for((started.folder / "rollout3").exists)
        started.process.send_signal(end)
    started.wait()
    started.check_nothing_is_left()


def test_nothing_is_left_when_one_of_two_ranks_is_killed(run):
    started = run(num_rollouts=1000, devices=2, strategy="ddp")
    started.wait_for((started.folder / "rollout3").exists, seconds=300)
    shared_memory = started.shared_memory()
    started.process.kill()
    started.wait()
    started.check_nothing_is_left(shared_memory, seconds=60)
