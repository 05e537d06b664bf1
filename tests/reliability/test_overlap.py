"""Rollouts sampled ahead by a real vLLM: it works while the trainer updates, what is promised of staleness holds."""

import json
import time
from collections import Counter
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from drpo_lightning.batch import Sampling
from drpo_lightning.callbacks import SyncProbe
from drpo_lightning.rollout import RolloutHooks, VLLMEngine
from drpo_lightning.rollout.in_process_vllm import InProcessVLLM
from tests.reliability.test_kill import CTRL_C, TERM, lives, run_to_its_end  # noqa: F401 - a fixture

pytestmark = pytest.mark.reliability
NUM_ROLLOUTS = 4


class Timed(InProcessVLLM):
    """Notes when it computes, and for which requests; in the background one token of each sequence whenever allowed."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.steps, self.is_allowed = [], False

    def allow(self):
        self.is_allowed = self._requests.are_in_flight
        return self.is_allowed

    def work(self):
        if not self.is_allowed:
            return False
        self.is_allowed = False
        started, numbers = time.monotonic(), list(self._submitted)
        worked = super().work()
        self.steps.append((started, time.monotonic(), numbers))
        return worked

    def taken_steps(self):
        return self.steps


class Times(Callback, RolloutHooks):
    """Lets the engine compute in each update, waits until it has, and notes when the update was."""

    def __init__(self):
        self.updates, self.rollouts, self.steps = [], [], []

    def on_rollout_end(self, trainer, pl_module, rollout):
        self.rollouts.append(rollout)

    def on_train_batch_start(self, trainer, pl_module, *_):
        engine = trainer.datamodule.engine
        self.before, self.started = engine._remote._heartbeat.count, time.monotonic()
        self.is_ahead = engine._call("allow", 60)

    def on_before_zero_grad(self, trainer, *_):
        """In the middle of the update."""
        end = time.monotonic() + 20
        while self.is_ahead and trainer.datamodule.engine._remote._heartbeat.count == self.before:
            assert time.monotonic() < end
            time.sleep(0.001)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.updates.append((trainer.current_epoch, self.started, time.monotonic()))

    def on_train_end(self, trainer, pl_module):
        self.steps = trainer.datamodule.engine._call("taken_steps", 60)


def overlaps(times):
    """How many steps of which rollout (by its distance) were taken within updates of another."""
    return Counter(
        number // 4 - epoch
        for epoch, started, ended in times.updates
        for begun, done, numbers in times.steps
        if started <= begun and done <= ended
        for number in set(numbers)
    )


@pytest.mark.parametrize(
    ("max_staleness", "in_flight"), [(0, "continue"), (1, "continue"), (2, "continue"), (2, "drop")]
)
def test_the_next_rollouts_are_sampled_within_the_updates_on_this_one(make_run, monkeypatch, max_staleness, in_flight):
    monkeypatch.setattr("drpo_lightning.rollout.vllm.InProcessVLLM", Timed)
    times = Times()
    make_run(
        times,
        SyncProbe(),
        trainer={"max_epochs": NUM_ROLLOUTS},
        data={
            "engine": VLLMEngine("own", dtype="float32", enforce_eager=True),
            "max_staleness": max_staleness,
            "in_flight": in_flight,
            "sampling": Sampling(max_tokens=12, temperature=1.5),
        },
    ).fit()
    staleness = [rollout.staleness.tolist() for rollout in times.rollouts]
    found = overlaps(times)
    assert found.keys() == set(range(1, max_staleness + 1))
    if in_flight == "continue":
        assert staleness == [[min(i, max_staleness)] * 16 for i in range(NUM_ROLLOUTS)]
    else:
        assert all(max(samples) <= min(i, max_staleness) for i, samples in enumerate(staleness))


OVERLAP = f"--config={Path(__file__).with_name('overlap.yaml')}"
UNEVEN = "--data.engine=tests.datamodules.engine_ahead.UnevenEngine"


def trained(folder):
    """What each micro-batch of each rollout was, when it was trained on last: after a kill some are begun again."""
    lines = map(json.loads, (folder / "ledger.jsonl").read_text().splitlines())
    return {(line["rollout"], line["batch"]): line for line in lines}


@pytest.mark.parametrize(
    ("kills", "arguments"),
    [
        (["rollout:3:0.1", f"reward:2:0:{TERM}"], ()),
        (["rollout:2:0.1", "backward:3:0", f"reward:2:0:{TERM}", "write:3:0.5", f"batch:2:0:{CTRL_C}"], (UNEVEN,)),
    ],
    ids=["vllm", "uneven"],
)
def test_a_killed_run_loses_nothing_and_trains_on_nothing_twice(lives, tmp_path, kills, arguments):  # noqa: F811
    run_to_its_end(lives, tmp_path / "killed", kills, OVERLAP, *arguments)
    run_to_its_end(lives, tmp_path / "whole", [], OVERLAP, UNEVEN, "--data.max_staleness=0")
    ours, theirs = trained(tmp_path / "killed"), trained(tmp_path / "whole")
    assert ours.keys() == theirs.keys() == {(rollout, batch) for rollout in range(6) for batch in range(4)}
    for rollout in range(6):
        batches = [ours[rollout, batch] for batch in range(4)]
        assert sorted(sample for batch in batches for sample in batch["samples"]) == list(range(16))
        for batch in batches:
            assert batch["prompts"] == theirs[rollout, 0]["prompts"]
            assert batch["completions"] == batches[0]["completions"]
            assert max(batch["staleness"]) <= min(rollout, 2)
    assert max(max(batch["staleness"]) for batch in ours.values()) > 0
