"""How completions are scored: what a reward may return, and errors that name the completion."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drpo_lightning.rewards import FailurePolicy, Reward, RewardBatch, RewardFailure, combine_rewards, score_rewards
from drpo_lightning.rewards.base import RewardError


class Function(Reward):
    def __init__(self, function, name="test", weight=1.0):
        self.function = function
        self.name = name
        self.weight = weight

    def score(self, batch):
        return self.function(batch)


def batch(size=3):
    return RewardBatch(
        prompts=[f"prompt {i}" for i in range(size)],
        completions=[f"completion {i}" for i in range(size)],
        completion_ids=[[i] for i in range(size)],
        finish_reasons=["stop"] * size,
        columns={"answer": [f"answer {i}" for i in range(size)], "level": list(range(size))},
    )


def scores(*values):
    """What `score_rewards` makes of a reward that returns these values."""
    return score_rewards([Function(lambda _: values)], batch(len(values))).parts["test"]


def test_scores_stand_under_the_names_of_their_rewards():
    longest = Function(lambda b: [float(len(text)) for text in b.completions], "length")
    level = Function(lambda b: b.column("level"), "level")
    parts = score_rewards([longest, level], batch()).parts
    assert {name: values.tolist() for name, values in parts.items()} == {"length": [12.0] * 3, "level": [0.0, 1.0, 2.0]}
    assert all(values.dtype == torch.float32 for values in parts.values())


def test_none_does_not_apply_and_reads_nan():
    assert scores(1.0, None, 0.0).isnan().tolist() == [False, True, False]


def test_integers_and_the_float64_of_numpy_are_scores():
    assert scores(1, np.float64(0.5), -2).tolist() == [1.0, 0.5, -2.0]


def test_any_sequence_of_scores_will_do():
    reward = Function(lambda b: (float(i) for i in range(len(b))))
    assert score_rewards([reward], batch()).parts["test"].tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), "1.0", "nan", [1.0], 1j, object()])
def test_what_is_no_finite_number_is_refused_and_its_completion_named(bad):
    with pytest.raises(RewardError, match="neither a finite float nor None") as error:
        scores(1.0, bad, 0.0)
    message = str(error.value)
    assert f"reward 'test' returned {bad!r}" in message
    for part in ("'prompt 1'", "'completion 1'", "'answer': 'answer 1'", "'level': 1"):
        assert part in message


def test_a_comparison_is_a_score():
    assert scores(1.0, True, False).tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("count", [0, 2, 4])
def test_one_score_per_completion(count):
    with pytest.raises(RewardError, match=f"reward 'test' returned {count} scores for 3 completions"):
        score_rewards([Function(lambda _: [1.0] * count)], batch())


def test_an_exception_names_the_completion_that_raises_it():
    def fragile(batch):
        return [1 / (level - 1) for level in batch.column("level")]

    with pytest.raises(RewardError, match="reward 'test' raised ZeroDivisionError") as error:
        score_rewards([Function(fragile)], batch())
    message = str(error.value)
    for part in ("prompt 'prompt 1'", "completion 'completion 1'", "'answer': 'answer 1'", "'level': 1"):
        assert part in message
    assert "prompt 0" not in message
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_an_exception_that_no_single_completion_causes_says_so():
    def only_alone(batch):
        if len(batch) > 1:
            raise OSError("too many at once")
        return [1.0]

    with pytest.raises(RewardError, match=r"too many at once.*no single completion of the 3 makes it raise"):
        score_rewards([Function(only_alone)], batch())


def test_a_missing_column_names_the_columns_there_are():
    with pytest.raises(RewardError, match=r"no column 'solution'; it has \['answer', 'level'\]"):
        score_rewards([Function(lambda b: b.column("solution"))], batch())


def test_keyboard_interrupt_is_not_taken_for_a_fault_of_the_reward():
    def interrupted(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_rewards([Function(interrupted)], batch())


def test_rewards_of_one_name_are_refused():
    with pytest.raises(RewardError, match=r"different names, got \['a', 'b', 'a'\]; set `name`"):
        score_rewards([Function(lambda _: [1.0] * 3, name) for name in ("a", "b", "a")], batch())


def test_the_sum_is_weighted_over_the_rewards_that_apply():
    parts = {"a": torch.tensor([1.0, math.nan, 2.0]), "b": torch.tensor([10.0, 3.0, math.nan])}
    assert combine_rewards(parts, {"a": 0.5, "b": -2.0}).tolist() == [-19.5, -6.0, 1.0]


@given(
    st.lists(st.tuples(st.floats(-9, 9), st.lists(st.none() | st.floats(-9, 9), min_size=4, max_size=4)), min_size=1)
)
def test_the_sum_equals_a_loop(rewards):
    parts = {
        str(i): torch.tensor([math.nan if score is None else score for score in row])
        for i, (_, row) in enumerate(rewards)
    }
    parts["always"] = torch.ones(4)
    weights = {str(i): weight for i, (weight, _) in enumerate(rewards)} | {"always": 1.0}
    expected = [1 + sum(w * row[i] for w, row in rewards if row[i] is not None) for i in range(4)]
    assert combine_rewards(parts, weights).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_completion_that_no_reward_applies_to_is_refused():
    parts = {"a": torch.tensor([1.0, math.nan, 2.0]), "b": torch.tensor([10.0, math.nan, math.nan])}
    with pytest.raises(RewardError, match="no reward applies to completion 1: all returned None"):
        combine_rewards(parts, {"a": 1.0, "b": 1.0})


@pytest.mark.parametrize("size", [1e39, -1e300])
def test_a_score_beyond_float32_is_refused(size):
    with pytest.raises(RewardError, match="neither a finite float nor None"):
        scores(size)


def test_a_sum_beyond_float32_is_refused():
    with pytest.raises(RewardError, match="the weighted sum of the rewards of completion 1 is not finite"):
        combine_rewards({"a": torch.tensor([0.0, 3e38])}, {"a": 2.0})


def test_sys_exit_in_a_reward_does_not_end_the_run_as_a_success():
    def leaves(_):
        raise SystemExit(0)

    with pytest.raises(RewardError, match=r"reward 'test' raised SystemExit\(0\)"):
        score_rewards([Function(leaves)], batch())


FAILURES = [0.5, RewardFailure("error", "fell", "its words"), None, RewardFailure("timeout", "slept")]


def failing(name="test", **policy):
    reward = Function(lambda _: FAILURES, name)
    reward.failure_policy = FailurePolicy(**policy)
    return reward


def test_a_failure_of_a_reward_without_a_policy_is_no_score():
    with pytest.raises(RewardError, match=r"returned RewardFailure\(.*neither a finite float nor None"):
        score_rewards([Function(lambda _: FAILURES)], batch(4))


def test_failures_raise_by_default():
    with pytest.raises(
        RewardError, match=r"(?s)reward 'test' fell, for prompt 'prompt 1'.*failed on 2 of 4.*\nits words"
    ):
        score_rewards([failing()], batch(4))


def test_failures_are_dropped_or_scored_by_policy_and_counted():
    always = Function(lambda _: [1.0, 2.0, 3.0, 4.0], "always")
    dropping, scoring = failing("d", on_failure="drop_sample"), failing("s", on_failure="score", failure_score=-1.0)
    result = score_rewards([always, dropping], batch(4))
    assert result.dropped.tolist() == [False, True, False, True]
    assert result.errors["d"].tolist() == [False, True, False, False]
    assert result.timeouts["d"].tolist() == [False, False, False, True]
    total = combine_rewards(result.parts, {"always": 1.0, "d": 2.0}, result.dropped).tolist()
    assert (total[0], total[2]) == (2.0, 3.0)
    assert math.isnan(total[1])
    assert math.isnan(total[3])
    result = score_rewards([always, scoring], batch(4))
    assert not result.dropped.any()
    assert combine_rewards(result.parts, {"always": 1.0, "s": 2.0}, result.dropped).tolist() == [2.0, 0.0, 3.0, 2.0]
    assert (result.errors.keys(), result.timeouts.keys()) == ({"s"}, {"s"})


def test_a_dropped_completion_needs_no_reward_that_applies_but_another_does():
    result = score_rewards([failing(on_failure="drop_sample")], batch(4))
    with pytest.raises(RewardError, match="no reward applies to completion 2"):
        combine_rewards(result.parts, {"test": 1.0}, result.dropped)
