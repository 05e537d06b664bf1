"""A run on the console: lines for rollouts, and a bar that says which phase a run is in."""

import os
import pty
import subprocess
import sys
import time

import pytest
from lightning.pytorch import Callback

from drpo_lightning.callbacks import MaskStatistics, PolicyShift, RolloutProgress, RolloutStatistics
from drpo_lightning.datamodules import ArithmeticPrompts
from drpo_lightning.rollout import RolloutHooks

VALIDATION = {"val_prompts": ArithmeticPrompts("validation", max_operand=9, num_validation=20), "val_num_samples": 2}


class Watch(Callback, RolloutHooks):
    """Reads the bar in every phase; it stands after the bar in the list of callbacks."""

    def __init__(self, bar):
        self.bar = bar
        self.phases = []

    def on_engine_refresh(self, trainer, pl_module, engine):
        self.phases.append(self.bar.phase)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.phases.append(self.bar.phase)


def lines_of(capsys):
    return [line.split() for line in capsys.readouterr().out.splitlines() if line.split()]


def test_the_bar_names_rollout_and_phase(make_run):
    bar = RolloutProgress()
    watch = Watch(bar)
    make_run(bar, watch, trainer={"enable_progress_bar": True, "max_epochs": 2}, data=VALIDATION).fit()
    assert watch.phases == [
        "Rollout 1/2, validating",
        *(
            f"Rollout {rollout}/2, {phase}"
            for rollout in (1, 2)
            for phase in ("sampling", "updating", "updating", "validating")
        ),
    ]
    assert bar.phase == ""


def test_without_a_number_of_rollouts_there_is_a_question_mark(make_run):
    bar = RolloutProgress()
    watch = Watch(bar)
    make_run(bar, watch, trainer={"enable_progress_bar": True, "max_epochs": -1, "max_steps": 1}).fit()
    assert watch.phases[0] == "Rollout 1/?, sampling"


def test_every_rollout_has_a_line_with_what_is_logged_of_it(make_run, make_memory, capsys):
    memory = make_memory()
    make_run(
        RolloutProgress(),
        RolloutStatistics(),
        PolicyShift(),
        trainer={"enable_progress_bar": True, "max_epochs": 3, "logger": memory},
    ).fit()
    header, *lines = lines_of(capsys)
    assert header == ["rollout", "updates", "reward", "|pi-mu|", "tokens", "cut", "tok/s", "s"]
    assert [line[:2] for line in lines] == [["1", "2"], ["2", "4"], ["3", "6"]]
    table = dict(zip(header, zip(*lines, strict=True), strict=True))
    rewards = [f"{value:.3f}" for value in memory.values("reward/mean")]
    assert list(table["reward"]) == rewards
    last = memory.values("policy_shift/abs_mean")[1::2]
    assert [float(value) for value in table["|pi-mu|"]] == pytest.approx(last, rel=0.01, abs=5e-4)


def test_every_second_rollout_and_none(make_run, capsys):
    for every, expected in ((2, ["1", "3"]), (0, [])):
        make_run(
            RolloutProgress(every_n_rollouts=every),
            RolloutStatistics(),
            trainer={"enable_progress_bar": True, "max_epochs": 4},
        ).fit()
        assert [line[0] for line in lines_of(capsys)[1:]] == expected


def test_verbose_shows_every_metric(make_run, capsys):
    run = make_run(
        RolloutProgress(verbose=True), RolloutStatistics(), MaskStatistics(), trainer={"enable_progress_bar": True}
    )
    run.fit()
    shown = {line[0] for line in lines_of(capsys)}
    assert shown >= set(run.trainer.callback_metrics)


def test_a_line_is_no_wider_than_a_terminal(make_run, capsys):
    make_run(RolloutProgress(), RolloutStatistics(), PolicyShift(), trainer={"enable_progress_bar": True}).fit()
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 120


def test_a_negative_interval_is_refused():
    with pytest.raises(ValueError, match="`every_n_rollouts` must be 0 or positive"):
        RolloutProgress(every_n_rollouts=-1)


SCRIPT = """
import time
from drpo_lightning.callbacks import RolloutProgress
from types import SimpleNamespace
trainer = SimpleNamespace(max_epochs=3, current_epoch=1, state=SimpleNamespace(fn="fit"))
bar = RolloutProgress()
bar.on_rollout_start(trainer, None)
time.sleep(0.5)
bar.print("a line")
time.sleep(0.5)
bar._end()
"""


def output_on_a_terminal(script):
    """What a program writes if its output is a terminal."""
    leader, follower = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen([sys.executable, "-c", script], stdout=follower, stderr=follower, env=environment) as child:
        os.close(follower)
        output, deadline = b"", time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                chunk = os.read(leader, 4096)
            except OSError:  # the program has closed its end
                break
            if not chunk:
                break
            output += chunk
        child.wait(timeout=60)
    os.close(leader)
    return output.decode()


def test_the_bar_is_drawn_on_a_terminal_and_nowhere_else():
    drawn = output_on_a_terminal(SCRIPT)
    assert "Rollout 2/3, sampling" in drawn
    assert "a line" in drawn
    plain = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    assert plain.stdout == "a line\n"
