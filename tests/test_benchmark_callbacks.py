"""The benchmark of the diagnostics runs, and timing a callback changes nothing about it."""

import importlib
import json
import shutil
import sys
import time
from pathlib import Path

import pytest
from lightning.pytorch import Callback

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """The module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("callbacks")
    del sys.modules["callbacks"]


@pytest.fixture
def chat_model(model_folder, tmp_path):
    """The small model with a chat template that is the message."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    template = {"chat_template": "{{ messages[0]['content'] }}"}
    path.write_text(json.dumps(json.loads(path.read_text()) | template))
    return str(folder)


def test_it_shows_what_each_callback_takes_beside_the_training_steps(benchmark, chat_model, capsys):
    benchmark.main(["--model", chat_model, "--rollouts", "1", "--prompts", "2"])
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("training steps"))
    assert "1 rollouts of 16 completions, 4 updates each" in lines[start - 1]
    steps, *rows = (line.split() for line in lines[start:])
    *rows, total = rows
    assert {name for name, *_ in rows} >= {"PolicyShift", "MismatchAndDrift", "RolloutStatistics", "Dashboard"}
    assert [float(row[1]) for row in rows] == sorted((float(row[1]) for row in rows), reverse=True)
    assert float(steps[2]) > 0
    assert float(total[2]) == pytest.approx(sum(float(row[1]) for row in rows), abs=0.01 * len(rows))


def test_a_timed_callback_does_and_answers_what_it_did_before(benchmark):
    class Doubling(Callback):
        def on_fit_start(self, number, *, fails=False):
            time.sleep(0.01)
            if fails:
                raise ValueError("it fails")
            return 2 * number

    seconds = {"Doubling": 0.0}
    callback = benchmark.timed(Doubling(), seconds)
    assert callback.on_fit_start(21) == 42
    after_one = seconds["Doubling"]
    with pytest.raises(ValueError, match="it fails"):
        callback.on_fit_start(21, fails=True)
    assert seconds["Doubling"] - after_one >= 0.01
    assert after_one >= 0.01
    assert isinstance(callback, Doubling)
