"""math-verify in worker processes: what it cannot decide in time costs one completion."""

import sys
import threading

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback

from drpo_lightning.errors import SettingError
from drpo_lightning.rewards import RewardBatch, RewardError, RewardFailure, score_rewards

pytest.importorskip("math_verify")
from drpo_lightning.callbacks import MathVerifyReward

ENDLESS = r"\boxed{9^{9^{9^{9}}}}"


def batch(*completions, answer=r"\frac{1}{2}"):
    return RewardBatch(
        ["p"] * len(completions),
        completions,
        [[1]] * len(completions),
        ["stop"] * len(completions),
        {"answer": [answer] * len(completions)},
    )


@pytest.fixture(scope="module")
def reward():
    reward = MathVerifyReward(num_workers=1, timeout_seconds=1.0)
    yield reward
    reward.close()


def test_a_comparison_without_end_is_a_timeout_and_the_others_are_scored(reward):
    before, endless, after = reward.score(batch(r"\boxed{0.5}", ENDLESS, r"\boxed{0.6}"))
    assert (before, after) == (1.0, 0.0)
    assert isinstance(endless, RewardFailure)
    assert endless.kind == "timeout"


def test_it_scores_from_any_thread(reward):
    results = []
    thread = threading.Thread(target=lambda: results.append(reward.score(batch(r"\boxed{0.5}", "0.5"))))
    thread.start()
    thread.join()
    assert results == [[1.0, 0.0]]


@pytest.mark.parametrize("answer", ["", "so it is 5\n####"])
def test_a_row_without_an_answer_ends_the_run_whatever_becomes_of_failures(reward, answer):
    with pytest.raises(RewardError, match=r"the answer '.*' cannot be read as mathematics.*it does so for prompt 'p'"):
        score_rewards([reward], batch(r"\boxed{0.5}", answer=answer))


def test_failures_count_as_0_unless_it_is_told_otherwise():
    assert vars(MathVerifyReward().failure_policy) == {"on_failure": "score", "failure_score": 0.0}
    assert MathVerifyReward(failure_score=-1.0).failure_policy.failure_score == -1.0
    assert vars(MathVerifyReward(on_failure="raise").failure_policy) == {"on_failure": "raise", "failure_score": None}


def test_its_answers_are_the_boxes():
    assert MathVerifyReward().answers(batch(r"\boxed{1} \boxed{\frac{1}{2}}", "5")) == [r"\frac{1}{2}", None]
    assert MathVerifyReward(boxed=False).answers(batch("5")) is None


def test_its_settings_are_flat_in_a_configuration():
    parser = ArgumentParser()
    parser.add_argument("--reward", type=Callback)
    settings = {"column": "solution", "num_workers": 3, "weight": 0.5, "max_stored_failures": 7}
    config = parser.parse_object({"reward": {"class_path": "MathVerifyReward", "init_args": settings}})
    reward = parser.instantiate(config).reward
    assert (reward.required_columns, reward.weight, reward.max_stored_failures) == (("solution",), 0.5, 7)
    assert reward.name == "math"
    with pytest.raises(Exception, match="reward"):  # what it isolates is its own affair
        MathVerifyReward(reward=reward)


def test_without_math_verify_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.delitem(sys.modules, "drpo_lightning.rewards.math_answer")
    with pytest.raises(SettingError, match=r"needs math-verify: pip install 'drpo-lightning\[math\]'"):
        MathVerifyReward()
