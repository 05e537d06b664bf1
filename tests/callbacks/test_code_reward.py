"""Programs in completions, scored in the workers."""

import pytest

from drpo_lightning.callbacks import CodeReward
from drpo_lightning.datamodules.scored_rollout import check_columns
from drpo_lightning.errors import SettingError
from drpo_lightning.rewards import RewardBatch
from drpo_lightning.rewards.code_execution import check_namespaces

TESTS = ["assert f(1) == 2", "assert f(2) == 3", "assert f(3) == 5"]
RIGHT = "```python\ndef f(x): return {1: 2, 2: 3, 3: 5}[x]\n```"
MOSTLY = "```python\ndef f(x): return x + 1\n```"
LATE = "```python\nwhile True: pass\n```"

try:
    check_namespaces()
    NAMESPACES = True
except SettingError:
    NAMESPACES = False


def batch(*completions, tests=TESTS):
    n = len(completions)
    return RewardBatch(["p"] * n, completions, [[1]] * n, ["stop"] * n, {"tests": [tests] * n})


def make_reward(**settings):
    return CodeReward(**({"num_workers": 1, "namespaces": NAMESPACES} | settings))


@pytest.fixture(scope="module")
def share():
    """Gives partial credit, within a short time."""
    reward = make_reward(case_timeout_seconds=1.0, timeout_seconds=1.5, partial_credit=True, on_failure="raise")
    yield reward
    reward.close()


def test_a_program_passes_all_tests_or_none():
    reward = make_reward()
    assert reward.score(batch(RIGHT, MOSTLY, "def f(x): return x", "```python\n```")) == [1.0, 0.0, 0.0, 0.0]
    reward.close()


def test_a_program_gets_its_share_if_asked(share):
    scores = share.score(batch(RIGHT, MOSTLY, "def f(x): return x", "```python\n```"))
    assert scores == pytest.approx([1.0, 2 / 3, 0.0, 0.0])


def test_a_late_program_has_not_passed_and_is_no_failure(share):
    assert share.score(batch(LATE, RIGHT)) == [0.0, 1.0]


def test_rows_with_tests_of_no_known_form_are_refused_at_the_start():
    rewards = [make_reward(on_failure="drop_sample")]
    with pytest.raises(SettingError, match=r"`data\.prompts`: row 1: reward 'code': a test must be Python .* got 5"):
        check_columns([{"tests": "assert True"}, {"tests": [5]}], rewards, "data.prompts")


@pytest.mark.parametrize("setting", ["timeout_seconds", "case_timeout_seconds", "memory_limit_gib", "max_processes"])
def test_bad_settings_are_named(setting):
    with pytest.raises(ValueError, match=f"`{setting}` must be positive and finite, got 0"):
        CodeReward(**{setting: 0})


def test_it_is_logged_and_weighed_like_other_rewards():
    reward = make_reward(weight=0.5, column="cases")
    assert (reward.name, reward.weight, reward.required_columns) == ("code", 0.5, ("cases",))
