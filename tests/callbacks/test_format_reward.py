"""Regular expressions: where they must match, and one that would never end."""

import time

import pytest

from drpo_lightning.callbacks import FormatReward
from drpo_lightning.rewards import RewardBatch, score_rewards

R1 = r"<think>.*</think>\s*<answer>.*</answer>\s*"
GOOD = "<think>two\nlines</think>\n<answer>4</answer>\n"


def batch(*completions):
    return RewardBatch(["p"] * len(completions), completions, [[1]] * len(completions), ["stop"] * len(completions))


@pytest.mark.parametrize(
    ("where", "scores"),
    [("whole", [1.0, 0.0, 0.0, 0.0]), ("start", [1.0, 1.0, 0.0, 0.0]), ("anywhere", [1.0, 1.0, 1.0, 0.0])],
)
def test_a_pattern_must_match_where_it_is_said_to(where, scores):
    reward = FormatReward(R1, where=where)
    assert reward.score(batch(GOOD, GOOD + "and more", "well: " + GOOD, GOOD.replace("</think>", ""))) == scores


def test_exponential_backtracking_is_a_timeout_and_the_others_are_scored():
    reward = FormatReward("(a|aa)+", timeout_seconds=0.1)
    start = time.monotonic()
    scores = score_rewards([reward], batch("aaa", "a" * 60 + "b", "none"))
    assert time.monotonic() - start < 5
    assert scores.parts["format"].tolist() == [1.0, 0.0, 0.0]
    assert scores.timeouts["format"].tolist() == [False, True, False]
    assert scores.failures["format"][1].reason == "could not match its pattern within 0.1 s"


def test_flags_in_the_pattern_count():
    assert FormatReward("(?i)yes").score(batch("YES", "no")) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "(a"}, r"`pattern` '\(a' is no regular expression: missing \)"),
        ({"pattern": "a", "where": "end"}, r"`where` must be one of \['whole', 'start', 'anywhere'\], got 'end'"),
        ({"pattern": "a", "timeout_seconds": 0}, "`timeout_seconds` must be positive and finite, got 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        FormatReward(**settings)


def test_a_timeout_can_be_dropped_or_raised():
    assert FormatReward("a", on_failure="drop_sample").failure_policy.failure_score is None
    assert FormatReward("a").failure_policy.failure_score == 0.0
