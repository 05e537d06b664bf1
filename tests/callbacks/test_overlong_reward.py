"""DAPO's soft overlong punishment against its three cases, and the settings that could not work."""

import pytest

from drpo_lightning.batch import Sampling
from drpo_lightning.callbacks import OverlongReward
from drpo_lightning.errors import SettingError
from drpo_lightning.rewards import RewardBatch
from drpo_lightning.rewards.length import overlong_penalty


def reference(length, max_length, cache):
    """Equation 13 of arXiv 2503.14476, case by case."""
    if length <= max_length - cache:
        return 0.0
    if length <= max_length:
        return ((max_length - cache) - length) / cache
    return -1.0


@pytest.mark.parametrize(("max_tokens", "buffer_tokens"), [(20, 5), (20, 20), (20, 1), (1, 1)])
def test_the_penalty_is_that_of_the_paper(max_tokens, buffer_tokens):
    for length in range(max_tokens + 10):
        penalty = overlong_penalty(length, max_tokens=max_tokens, buffer_tokens=buffer_tokens)
        assert penalty == pytest.approx(reference(length, max_tokens, buffer_tokens))


@pytest.mark.parametrize(
    ("length", "penalty"), [(0, 0.0), (16384, 0.0), (16385, -1 / 4096), (18432, -0.5), (20480, -1.0), (30000, -1.0)]
)
def test_the_papers_own_lengths(length, penalty):
    assert overlong_penalty(length, max_tokens=20480, buffer_tokens=4096) == penalty


def test_the_reward_counts_tokens_not_characters():
    batch = RewardBatch(["p"] * 3, ["long" * 50, "x", "x"], [[1], [1] * 9, [1] * 10], ["stop", "stop", "length"])
    assert OverlongReward(max_tokens=10, buffer_tokens=4).score(batch) == [0.0, -0.75, -1.0]


@pytest.mark.parametrize("buffer_tokens", [0, -1, 11])
def test_a_buffer_that_does_not_fit_is_refused(buffer_tokens):
    with pytest.raises(
        ValueError, match=rf"`buffer_tokens` must be in \[1, `max_tokens`\] = \[1, 10\], got {buffer_tokens}"
    ):
        OverlongReward(max_tokens=10, buffer_tokens=buffer_tokens)


def test_a_penalty_that_no_completion_reaches_is_refused(make_run):
    data = {"sampling": Sampling(max_tokens=4)}
    with pytest.raises(SettingError, match=r"'overlong' starts beyond 6 tokens, .* `data.sampling.max_tokens` is 4"):
        make_run(rewards=[OverlongReward(max_tokens=8, buffer_tokens=2)], data=data).fit()


def test_a_run_adds_it_to_the_other_rewards(make_run, make_recorder):
    recorder = make_recorder()
    make_run(recorder, rewards=[OverlongReward(max_tokens=4, buffer_tokens=3, weight=2.0)]).fit()
    (rollout,) = recorder.rollouts
    assert rollout.rewards.tolist() == pytest.approx(
        [2 * reference(len(completion.token_ids), 4, 3) for completion in rollout.completions]
    )
    assert rollout.rewards.unique().numel() > 1
