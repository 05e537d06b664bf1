"""The benchmark of long runs counts what a run holds, and says what grows."""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
WITH_A_CHILD = """
import pathlib, subprocess, sys, time
memory = b"x" * (50 << 20)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
try:
    time.sleep(600)
finally:
    child.kill()
"""
ENDS_ITS_CHILD = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n" + WITH_A_CHILD
LEAVES_IT = "import os, signal\nsignal.signal(signal.SIGTERM, lambda *_: os._exit(0))\n" + WITH_A_CHILD


@pytest.fixture
def soak(monkeypatch):
    """The module."""
    pytest.importorskip("psutil")
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("soak")
    del sys.modules["soak"]


@pytest.fixture
def make_samples(soak):
    """Makes what was counted in an hour, a figure of which changes from one value to another half way."""

    def make(**changes):
        steady = {"trainer_mib": 900.0, "engine_mib": 700.0, "others_mib": 90.0, "handles": 200, "threads": 60}
        steady |= {"processes": 5, "shared_mib": 64.0}
        samples = []
        for number in range(360):
            values = steady | {name: pair[number >= 180] for name, pair in changes.items()}
            growing = {"seconds": 10.0 * (number + 1), "events_mib": 0.1 * number, "rollouts": 5 * number}
            samples.append(soak.Sample(**growing | values))
        return samples

    return make


def test_a_run_that_holds_what_it_held_is_flat(soak, make_samples, capsys):
    assert soak.report(make_samples(trainer_mib=(900.0, 915.0)))  # by less than an allocator moves
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1795 rollouts in 60 minutes"
    assert len(lines) == 2 + len(soak.TITLES)
    assert not any(line.endswith("grows") for line in lines)
    rates = {line[:38].strip(): float(line.split()[-3]) for line in lines[2:]}
    assert rates["TensorBoard, KiB per rollout"] == pytest.approx(0.1 * 1024 / 5, abs=0.01)
    assert rates["seconds per rollout"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("name", "values"),
    [("trainer_mib", (900.0, 930.0)), ("engine_mib", (700.0, 720.0)), ("handles", (200, 201)), ("processes", (5, 6))],
)
def test_what_grows_is_named(soak, make_samples, capsys, name, values):
    assert not soak.report(make_samples(**{name: values}))
    grown = [line for line in capsys.readouterr().out.splitlines() if line.endswith("grows")]
    assert [line[:38].strip() for line in grown] == [soak.TITLES[name]]


def test_a_run_too_short_to_have_rollouts_is_reported_all_the_same(soak, make_samples, capsys):
    assert soak.report([sample._replace(rollouts=0) for sample in make_samples()])
    assert "nan" in capsys.readouterr().out.splitlines()[-1]


def test_a_picture_has_a_panel_for_everything(soak, make_samples, tmp_path):
    soak.draw(make_samples(), tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 5000


def test_the_processes_of_a_run_are_counted_until_it_is_ended(soak, tmp_path):
    (tmp_path / soak.ROLLOUTS).write_text("7")
    (tmp_path / "events.out.one").write_bytes(bytes(soak.MIB))
    samples = soak.run([sys.executable, "-c", ENDS_ITS_CHILD, str(tmp_path / "pid")], tmp_path, seconds=3, interval=1)
    assert samples[-1].processes == 2
    assert 50 < samples[-1].trainer_mib < 200
    assert samples[-1].engine_mib > 0
    assert samples[-1].events_mib == 1
    assert samples[-1].rollouts == 7


def test_a_run_that_ends_by_itself_is_an_error(soak, tmp_path):
    with pytest.raises(RuntimeError, match="the run ended with 3"):
        soak.run([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, seconds=60, interval=0.5)


@pytest.mark.reliability
def test_what_a_run_leaves_behind_is_an_error(soak, tmp_path):
    pid = tmp_path / "pid"
    with pytest.raises(RuntimeError, match="left behind"):
        soak.run([sys.executable, "-c", LEAVES_IT, str(pid)], tmp_path, seconds=3, interval=1)
    os.kill(int(pid.read_text()), signal.SIGKILL)


@pytest.mark.reliability
def test_the_quickstart_is_run_with_all_that_the_package_starts(soak, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(BENCHMARKS.parent)
    paths = {"logs": tmp_path / "logs", "samples": tmp_path / "soak.jsonl", "picture": tmp_path / "soak.png"}
    arguments = [f"--{name}={path}" for name, path in paths.items()]
    monkeypatch.setattr(sys, "argv", ["soak.py", "--minutes", "2", "--interval", "1", *arguments])
    assert soak.main() in (0, 1)  # too short to say that nothing grows
    samples = [soak.Sample(*json.loads(line)) for line in paths["samples"].read_text().splitlines()]
    assert len(samples) > 20
    assert samples[-1].rollouts > 0
    assert samples[-1].processes >= 3  # trainer, engine, reward
    assert samples[-1].engine_mib > 100
    assert paths["picture"].exists()
    assert f"{samples[-1].rollouts} rollouts in 2 minutes" in capsys.readouterr().out
