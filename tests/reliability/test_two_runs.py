"""Two runs at once do not mix: each has a folder of its own, or the second is refused and the first untouched."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.reliability
ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name("killed.yaml")
TIMEOUT_SECONDS = 120


@pytest.fixture
def start(tmp_path):
    """Starts `drpo fit`, with what it prints in a file; what still runs at the end is killed."""
    started = []

    def start(*arguments):
        where = (f"--vars.folder={tmp_path}", f"--trainer.default_root_dir={tmp_path}")
        command = [sys.executable, "-m", "drpo_lightning", "fit", f"--config={CONFIG}", *where, *arguments]
        log = tmp_path / f"printed-{len(started)}.txt"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with log.open("w") as output:
            run = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        run.log = log
        started.append(run)
        return run

    yield start
    for run in started:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


def wait_until(run, holds):
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not holds():
        assert run.poll() is None, run.log.read_text()[-3000:]
        assert time.monotonic() < deadline, run.log.read_text()[-3000:]
        time.sleep(0.1)


def names(checkpoints):
    return {path.name for path in checkpoints.glob("*.ckpt")}


def ended(run):
    return run.wait(timeout=TIMEOUT_SECONDS), run.log.read_text()


def test_a_second_run_that_would_go_on_with_the_first_is_refused_until_that_is_gone(start, tmp_path):
    first = start("--trainer.max_epochs=1000")
    checkpoints = tmp_path / "run" / "version_0" / "checkpoints"
    wait_until(first, lambda: names(checkpoints))
    status, printed = ended(start("--trainer.max_epochs=1000", "--ckpt_path=last"))
    assert status == 1
    assert "version_0': another run is writing there. Wait for its end, or end it" in printed
    assert "Loading weights" not in printed, "it is refused before the model is loaded"
    assert first.poll() is None, first.log.read_text()[-3000:]
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    before = names(checkpoints)
    third = start("--trainer.max_epochs=1000", "--ckpt_path=last")
    wait_until(third, lambda: names(checkpoints) - before)
    assert f"Going on from {checkpoints}" in third.log.read_text()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["version_0"]


def test_runs_that_start_at_once_end_side_by_side(start, tmp_path):
    runs = [start("--trainer.max_epochs=1", "--trainer.callbacks.dirpath=null") for _ in range(3)]
    for run in runs:
        status, printed = ended(run)
        # The journal of these tests writes into one folder, and finds the same there.
        assert status == 0, printed[-3000:]
    for logger, file in (("run", "checkpoints/last.ckpt"), ("table", "metrics.csv")):
        assert sorted(path.name for path in (tmp_path / logger).iterdir()) == [f"version_{i}" for i in range(3)]
        assert all((path / file).exists() for path in (tmp_path / logger).iterdir())


def test_two_ranks_of_one_run_are_no_two_runs_and_both_end_where_the_folder_is_in_use(start, tmp_path):
    ranks = (
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--trainer.logger.init_args.version=v",
    )  # of the second logger
    first = start("--trainer.max_epochs=1000", *ranks)
    wait_until(first, lambda: list(tmp_path.glob("run/*/checkpoints/*.ckpt")))
    status, printed = ended(start("--trainer.max_epochs=1", *ranks))
    assert status == 1
    assert "table/v': another run is writing there" in printed
    assert first.poll() is None
