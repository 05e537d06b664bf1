"""The state of a reward in a worker process: kept when the worker is not, saved, restored, or refused."""

import pytest
from lightning.pytorch import Trainer

from drpo_lightning.callbacks import ExactMatchReward, IsolatedReward
from drpo_lightning.errors import SettingError
from drpo_lightning.rewards import RewardBatch, RewardFailure
from tests.rewards.stateful import BeginsWithNothing, Counting, CountingPlain, TooLarge


def batch(*texts):
    size = len(texts)
    return RewardBatch(["p"] * size, texts, [[1]] * size, ["stop"] * size)


@pytest.fixture
def isolated():
    made = []

    def make(reward=None, **settings):
        settings = {"num_workers": 1, "on_failure": "drop_sample", "timeout_seconds": 0.5} | settings
        made.append(IsolatedReward(reward or Counting(), **settings))
        return made[-1]

    yield make
    for reward in made:
        reward.close()


def test_it_outlives_the_worker_and_a_failure_leaves_no_trace_in_it(isolated):
    reward = isolated()
    outcomes = reward.score(batch("a", "b", "exit", "c", "sleep", "tuple", "d"))
    assert [outcome if not isinstance(outcome, RewardFailure) else outcome.kind for outcome in outcomes] == [
        1,
        2,
        "error",
        3,
        "timeout",
        "error",
        4,
    ]
    assert "must be what JSON can hold: lists in place of tuples" in outcomes[5].reason
    assert reward.state_dict() == {"count": 4}
    reward.close()
    assert reward.score(batch("a")) == [5]


@pytest.mark.parametrize("kind", [Counting, BeginsWithNothing])
def test_another_reward_goes_on_from_it(isolated, kind):
    first, second = isolated(kind()), isolated(kind())
    first.score(batch("a", "b", "c"))
    second.load_state_dict(first.state_dict())
    assert second.score(batch("d")) == first.score(batch("d")) == [4]


def test_a_resumed_run_scores_as_one_that_was_never_interrupted(make_run, make_recorder, isolated, tmp_path):
    def rewards_of(max_epochs, **arguments):
        recorder = make_recorder()
        run = make_run(recorder, rewards=[isolated()], trainer={"max_epochs": max_epochs})
        run.fit(**arguments)
        run.trainer.save_checkpoint(tmp_path / f"{max_epochs}.ckpt")
        return [rollout.rewards.tolist() for rollout in recorder.rollouts]

    whole = rewards_of(2)
    assert whole == [[float(i) for i in range(1, 17)], [float(i) for i in range(17, 33)]]
    assert rewards_of(1) + rewards_of(2, ckpt_path=tmp_path / "1.ckpt") == whole


def test_what_cannot_be_kept_is_refused():
    with pytest.raises(SettingError, match=r"'counting' has a state .* each of 2 workers .* set `num_workers: 1`"):
        IsolatedReward(Counting())
    with pytest.raises(SettingError, match=r"'counting' must be what JSON can hold: .* names that are texts"):
        IsolatedReward(CountingPlain(), num_workers=1)
    with pytest.raises(SettingError, match=r"'counting' must be at most 49152 bytes as JSON, got 500"):
        IsolatedReward(TooLarge(), num_workers=1)


def test_on_several_ranks_it_is_refused(isolated):
    trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    with pytest.raises(SettingError, match=r"'counting' has a state .* each of 2 ranks would have its own"):
        isolated().setup(trainer, None, "fit")


def test_a_reward_without_a_state_has_none_to_be_given(isolated):
    reward = isolated(ExactMatchReward(), num_workers=2)
    assert reward.state_dict() == {}
    with pytest.raises(ValueError, match="has a state for the reward 'exact_match', which has none"):
        reward.load_state_dict({"count": 1})
