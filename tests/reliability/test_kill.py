"""A run that is killed at any moment and started again by the same command ends as one that never was.

Losses, rewards, prompts, weights and logged points are compared bit for bit.
"""

import csv
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name("killed.yaml")
UNEQUAL = re.compile("perf/|proxy/|custom_scalars|_hparams_|hp_metric")
"""Logged points that are times, that a rollout resumed in its middle leaves out, or that every start writes."""
FSDP2 = "{class_path: ModelParallelStrategy, init_args: {data_parallel_size: 2, tensor_parallel_size: 1}}"
TERM = f"{signal.SIGTERM:d}:75"
CTRL_C = f"{signal.SIGINT:d}:1"
PLACES = (
    "rollout",
    "reward",
    "rolled",
    "backward",
    "update",
    "batch",
    "validated",
    "epoch",
    "write",
    "rename",
    "renamed",
)


class Lives:
    """A process that runs `drpo` in forks of itself."""

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.lives"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def live(self, folder, *arguments, kill="", caught="", num_ranks=1, signal_number=0, after_seconds=0.0):
        """Exit statuses of the ranks of one life, and what it printed."""
        folder.mkdir(exist_ok=True)
        log = folder / f"life-{len(list(folder.glob('life-*')))}.txt"
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        where = [f"--vars.folder={folder}", f"--trainer.default_root_dir={folder}", f"--trainer.devices={num_ranks}"]
        life = {
            "arguments": ["fit", f"--config={CONFIG}", *where, *arguments],
            "log": str(log),
            "num_ranks": num_ranks,
            "port": port,
            "environment": {"KILL": kill, "SIGNAL": caught},
            "signal": signal_number,
            "after_seconds": after_seconds,
        }
        self.process.stdin.write(json.dumps(life) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline()), log.read_text()

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(timeout=10)
        finally:
            self.process.kill()


@pytest.fixture(scope="module")
def lives():
    lives = Lives()
    yield lives
    lives.close()


def points_of_tensorboard(folder):
    """Every logged value by tag and step, each once; scalars, histograms and texts."""
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0, "histograms": 0})
    events.Reload()
    tags, found = events.Tags(), []
    found += [((tag, e.step), e.value) for tag in tags["scalars"] for e in events.Scalars(tag)]
    found += [((tag, e.step), repr(e.histogram_value)) for tag in tags["histograms"] for e in events.Histograms(tag)]
    found += [((tag, e.step), e.tensor_proto.string_val[:]) for tag in tags["tensors"] for e in events.Tensors(tag)]
    return once(found)


def points_of_table(file):
    with file.open() as table:
        rows = list(csv.DictReader(table))
    return once([((name, row["step"]), x) for row in rows for name, x in row.items() if x and name != "step"])


def once(found):
    found = [(key, value) for key, value in found if not UNEQUAL.search(key[0])]
    twice = [key for key, count in Counter(key for key, _ in found).items() if count > 1]
    assert not twice, f"logged twice: {twice[:5]}"
    return dict(found)


def assert_ended_alike(folder, whole):
    """That two runs have the same rollouts, weights and points."""
    for path in sorted(whole.glob("rollout-*.json")):
        assert (folder / path.name).read_text() == path.read_text(), path.name
    ours, theirs = (torch.load(path / "weights.pt", weights_only=True) for path in (folder, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert_equal_points(*(points_of_tensorboard(run_of(path)) for path in (folder, whole)))
    tables = (sorted((path / "table").iterdir())[-1] for path in (folder, whole))
    assert_equal_points(*(points_of_table(table / "metrics.csv") for table in tables))


def run_of(folder):
    """The one log folder that has a checkpoint: before the first one there is nothing to go on from."""
    (checkpoints,) = [path for path in (folder / "run").glob("*/checkpoints") if list(path.glob("*.ckpt"))]
    return checkpoints.parent


def assert_equal_points(ours, theirs):
    assert ours.keys() == theirs.keys(), sorted(map(str, ours.keys() ^ theirs.keys()))[:10]
    assert len(ours) > 100
    different = [key for key in ours if ours[key] != theirs[key]]
    assert not different, different[:10]


def moments(number, seed, places=PLACES):
    """Random moments to die at: the first or second time that a life comes by a place, or after some seconds of it."""
    generator = random.Random(seed)
    timed = number // 5
    chosen = [places[i % len(places)] for i in range(number - timed)] + timed * ["seconds"]
    generator.shuffle(chosen)
    return [f"{place}:{generator.randint(1, 2)}:{generator.random():.3f}" for place in chosen]


def run_to_its_end(lives, folder, kills, *arguments, **settings):
    """Kills a run as often as there are `kills`, each time starts it again, and lets it end; what it printed.

    The fourth and fifth part of a kill are the number of a signal that is caught, and the exit status after it.
    """
    printed = []
    for kill in [*kills, ""]:
        place, count, fraction, caught, status = f"{kill}:::::".split(":")[:5]
        timed = {"signal_number": signal.SIGKILL, "after_seconds": 3 * float(fraction)} if place == "seconds" else {}
        moment = f"{place}:{count}:{fraction}" if kill else ""
        statuses, output = lives.live(
            folder, "--ckpt_path=last", *arguments, kill=moment, caught=caught, **settings, **timed
        )
        expected = int(status or (-signal.SIGKILL if kill else 0))
        assert expected in statuses, f"{kill} of {kills}: {statuses}\n{output[-3000:]}"
        printed.append(output)
    return printed


def half_written(printed):
    return sum("is half written" in output for output in printed)


@pytest.fixture(scope="module")
def whole(lives, tmp_path_factory):
    """Folders of runs that were never killed, by their arguments."""
    folders = {}

    def whole(*arguments, **settings):
        if arguments not in folders:
            folder = tmp_path_factory.mktemp("whole")
            statuses, printed = lives.live(folder, *arguments, **settings)
            assert set(statuses) == {0}, printed[-3000:]
            folders[arguments] = folder
        return folders[arguments]

    return whole


def test_a_run_killed_in_a_save_a_rollout_and_an_update_ends_as_one_that_never_was(lives, whole, tmp_path):
    arguments = ("--trainer.max_epochs=3",)
    kills = ["write:2:0.5", f"reward:1:0:{TERM}", "backward:2:0"]
    printed = run_to_its_end(lives, tmp_path, kills, *arguments)
    assert half_written(printed) == 1
    assert_ended_alike(tmp_path, whole(*arguments))


@pytest.mark.reliability
def test_a_run_killed_at_twenty_random_moments_ends_as_one_that_never_was(lives, whole, tmp_path, record_property):
    arguments = ("--trainer.max_epochs=40",)  # a fast machine is not done with it before the last kill
    kills = moments(20, seed=1)
    printed = run_to_its_end(lives, tmp_path, kills, *arguments)
    record_property("kills", str(Counter(kill.split(":")[0] for kill in kills)))
    record_property("half_written", half_written(printed))
    assert half_written(printed) >= 2
    assert_ended_alike(tmp_path, whole(*arguments))
    checkpoints = sorted(path.name for path in (run_of(tmp_path) / "checkpoints").iterdir())
    assert checkpoints == ["epoch=39-step=80.ckpt", "last.ckpt"]


@pytest.mark.reliability
@pytest.mark.parametrize("strategy", ["ddp", FSDP2], ids=["ddp", "fsdp2"])
def test_two_ranks_killed_at_random_moments_end_as_two_that_never_were(
    lives, whole, tmp_path, strategy, record_property
):
    arguments = ("--trainer.max_epochs=4", f"--trainer.strategy={strategy}")
    kills = moments(6, seed=2, places=("write", "rename", "reward", "renamed", "backward"))
    printed = run_to_its_end(lives, tmp_path, kills, *arguments, num_ranks=2)
    record_property("kills", str(Counter(kill.split(":")[0] for kill in kills)))
    record_property("half_written", half_written(printed))
    assert half_written(printed) >= 1
    assert_ended_alike(tmp_path, whole(*arguments, num_ranks=2))


@pytest.mark.reliability
@pytest.mark.parametrize("process", ["in_process", "own"])
def test_a_run_on_vllm_that_is_killed_ends_as_one_that_never_was(lives, whole, tmp_path, process):
    pytest.importorskip("vllm")
    vllm = f"{{class_path: drpo_lightning.rollout.VLLMEngine, init_args: {{dtype: float32, process: {process}}}}}"
    arguments = ("--trainer.max_epochs=3", f"--data.engine={vllm}")
    run_to_its_end(lives, tmp_path, ["sampling:2:0", "backward:3:0", "write:1:0.5"], *arguments)
    assert_ended_alike(tmp_path, whole(*arguments))


CAUGHT_AT = (
    "reward:2:0",
    "batch:1:0",
    "backward:2:0",
    "update:1:0",
    "reward:2:0",
    "rolled:1:0",
    "epoch:1:0",
    "reward:1:0",
)
"""The rewards are of the first rollout, of a validation and of another rollout, and take a minute."""


@pytest.mark.reliability
@pytest.mark.parametrize("caught", [TERM, CTRL_C], ids=["SIGTERM", "Ctrl-C"])
def test_a_run_that_is_asked_to_end_anywhere_goes_on_exactly(lives, whole, tmp_path, caught):
    arguments = ("--trainer.max_epochs=7",)
    started = time.monotonic()
    run_to_its_end(lives, tmp_path, [f"{place}:{caught}" for place in CAUGHT_AT], *arguments)
    assert time.monotonic() - started < 60 * len(CAUGHT_AT)
    assert_ended_alike(tmp_path, whole(*arguments))


@pytest.mark.reliability
def test_sigterm_of_one_of_two_ranks_ends_both_with_a_checkpoint(lives, whole, tmp_path):
    arguments = ("--trainer.max_epochs=4", "--trainer.strategy=ddp")
    printed = run_to_its_end(lives, tmp_path, [f"backward:2:0:{TERM}", f"rolled:1:0:{TERM}"], *arguments, num_ranks=2)
    assert not any("Traceback" in output for output in printed)
    assert_ended_alike(tmp_path, whole(*arguments, num_ranks=2))


@pytest.mark.reliability
def test_sigterm_of_one_of_two_ranks_before_the_training_ends_both(lives, tmp_path):
    statuses, printed = lives.live(
        tmp_path, "--trainer.strategy=ddp", kill="checking:1:0", caught=TERM[:2], num_ranks=2
    )
    assert statuses == [75, 75], printed[-3000:]
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.reliability
@pytest.mark.parametrize("strategy", ["ddp", FSDP2], ids=["ddp", "fsdp2"])
def test_sigterm_of_one_of_two_ranks_at_the_very_end_leaves_the_end_as_it_is(lives, whole, tmp_path, strategy):
    arguments = (
        "--trainer.max_epochs=2",
        f"--trainer.strategy={strategy}",
        "--trainer.callbacks.every_n_train_steps=50",
    )
    statuses, printed = lives.live(tmp_path, *arguments, kill="last:1:0", caught=TERM[:2], num_ranks=2)
    assert statuses == [0, 0], printed[-3000:]
    assert "the run ends before the next update" in printed
    assert_ended_alike(tmp_path, whole(*arguments, num_ranks=2))


def waiting(port):
    engine = f"{{urls: ['http://127.0.0.1:{port}'], start_timeout_seconds: 100}}"
    return f"--data.engine={{class_path: drpo_lightning.rollout.VLLMServerEngine, init_args: {engine}}}"


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("number", "checkpoints", "num_ranks", "status"),
    [
        (signal.SIGTERM, True, 1, 75),
        (signal.SIGTERM, True, 2, 75),
        (signal.SIGINT, True, 2, 1),
        (signal.SIGTERM, False, 1, 143),
    ],
)
def test_a_run_that_waits_for_servers_ends_when_it_is_asked_to(lives, tmp_path, number, checkpoints, num_ranks, status):
    strategy = "ddp" if num_ranks > 1 else "auto"
    callbacks = () if checkpoints else ("--trainer.callbacks=[{class_path: tests.reliability.victims.DrawingReward}]",)
    with socket.socket() as reserved:  # bound, and nobody listens
        reserved.bind(("127.0.0.1", 0))
        arguments = (waiting(reserved.getsockname()[1]), f"--trainer.strategy={strategy}", *callbacks)
        settings = {"signal_number": number, "after_seconds": 15, "num_ranks": num_ranks}
        started = time.monotonic()
        statuses, printed = lives.live(tmp_path, *arguments, **settings)
    assert "Waiting for rollout servers" in printed
    assert statuses == num_ranks * [status], printed[-3000:]
    assert time.monotonic() - started < 60
