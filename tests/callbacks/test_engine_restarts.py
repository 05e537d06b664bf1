"""A run whose engine fails: restarts are counted, and nothing else is different."""

import pytest
import torch

from drpo_lightning.callbacks import RolloutStatistics, SyncProbe
from drpo_lightning.rollout import EngineError, TransformersEngine


class Failing(TransformersEngine):
    """Fails in the middle of calls with given numbers, of `generate` and of `load_weights` together."""

    max_restarts = 1

    def __init__(self, numbers=()):
        super().__init__()
        self.numbers = numbers
        self.num_calls = 0

    def _note(self):
        self.num_calls += 1
        if self.num_calls - 1 in self.numbers:
            raise EngineError("out of order")

    def generate(self, *args, **kwargs):
        self._note()
        return super().generate(*args, **kwargs)

    def load_weights(self, weights):
        for i, item in enumerate(weights):
            if i == 3:
                self._note()
            super().load_weights([item])


@pytest.fixture
def fit(make_run, make_recorder, make_memory):
    """Three rollouts: of each a sync, a probe and the samples."""

    def fit(*numbers):
        run = make_run(
            RolloutStatistics(),
            SyncProbe(),
            recorder := make_recorder(),
            trainer={"max_epochs": 3, "logger": (memory := make_memory())},
            data={"engine": Failing(numbers)},
        )
        run.fit()
        return run, memory, [[c.token_ids for c in rollout.completions] for rollout in recorder.rollouts]

    return fit


@pytest.mark.parametrize("number", [3, 4, 5], ids=["sync", "probe", "samples"])
def test_a_restart_is_counted_and_changes_nothing(fit, number):
    run, memory, samples = fit()
    with pytest.warns(RuntimeWarning, match=r"(?s)^out of order.*started again|has the current weights again after"):
        restarted, its_memory, its_samples = fit(number)
    assert memory.values("engine/restarts") == [0, 0, 0]
    assert its_memory.values("engine/restarts") == [0, 1, 1]
    assert its_samples == samples
    assert memory.values("sync/probe_logprob_diff") == its_memory.values("sync/probe_logprob_diff")
    for ours, theirs in zip(restarted.module.parameters(), run.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_an_engine_that_fails_again_ends_the_run_and_is_closed(make_run):
    run = make_run(data={"engine": Failing([1, 3])})
    with (
        pytest.warns(RuntimeWarning, match="again"),
        pytest.raises(EngineError, match="the engine failed 2 times in a row; at last out of order"),
    ):
        run.fit()
    assert not run.data.engine.is_started


def test_an_engine_that_cannot_be_restarted_logs_no_restarts(make_run, make_memory):
    run = make_run(RolloutStatistics(), trainer={"logger": (memory := make_memory())})
    run.fit()
    assert "reward/mean" in memory.scalars
    assert "engine/restarts" not in memory.scalars
