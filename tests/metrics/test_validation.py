"""Statistics of validation prompts, against counting every choice of samples."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drpo_lightning.batch import Completion, Rollout
from drpo_lightning.metrics import ValidationStatistics, pass_at_k
from drpo_lightning.metrics.validation import majority_at_k


def scored(rewards, group_size, lengths=None, truncated=()):
    """A rollout of given rewards; completion i has `lengths[i]` tokens."""
    lengths = lengths or [1] * len(rewards)
    completions = [
        Completion([3] * length, [-1.0] * length, "length" if i in truncated else "stop")
        for i, length in enumerate(lengths)
    ]
    names = [""] * len(rewards)
    return Rollout(names, [[1]] * len(rewards), completions, names, {}, group_size, torch.tensor(rewards))


@pytest.mark.parametrize("num_samples", range(1, 8))
def test_pass_at_k_equals_counting_every_choice_of_k_samples(num_samples):
    for num_passed in range(num_samples + 1):
        passed = [True] * num_passed + [False] * (num_samples - num_passed)
        for k in range(1, num_samples + 1):
            choices = [any(choice) for choice in itertools.combinations(passed, k)]
            assert pass_at_k(num_samples, num_passed, k) == pytest.approx(sum(choices) / len(choices), abs=1e-12)


def test_pass_at_k_of_many_samples_does_not_overflow():
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)
    assert pass_at_k(10_000, 0, 5_000) == 0.0
    assert pass_at_k(10_000, 9_999, 2) == 1.0


def test_worked_by_hand():
    metric = ValidationStatistics()
    metric.update(scored([1.0, 0.0, 0.0, 0.0, 0.5, 2.0, 1.0, 0.0], 4, [1, 2, 3, 4, 5, 6, 7, 8], truncated=(3, 7)))
    assert metric.compute() == {
        "reward/mean": 4.5 / 8,
        "completions/mean_length": 4.5,
        "completions/truncated_fraction": 0.25,
        "pass@1": (1 / 4 + 2 / 4) / 2,
        "avg@4": (1 / 4 + 2 / 4) / 2,
        "pass@2": pytest.approx((3 / 6 + 5 / 6) / 2),
        "pass@4": 1.0,
    }


@pytest.mark.parametrize(
    ("group_size", "ks"), [(1, [1]), (2, [1, 2]), (3, [1, 2]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8])]
)
def test_k_is_every_power_of_two_up_to_the_samples(group_size, ks):
    metric = ValidationStatistics()
    metric.update(scored([1.0] * group_size, group_size))
    assert [name for name in metric.compute() if name.startswith("pass@")] == [f"pass@{k}" for k in ks]


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=12, max_size=12), st.integers(0, 6), st.integers(0, 6))
def test_prompts_may_be_split_unevenly_over_batches_and_ranks(rewards, first, second):
    whole = ValidationStatistics()
    lengths = list(range(1, 13))
    whole.update(scored(rewards, 2, lengths, truncated=(0,)))
    ranks = []
    for part in itertools.pairwise(sorted([0, 2 * first, 2 * second, 12])):
        metric = ValidationStatistics()
        chosen = slice(*part)
        metric.update(scored(rewards[chosen], 2, lengths[chosen], truncated=(0,) if part[0] == 0 < part[1] else ()))
        ranks.append(metric)
    for rank in ranks[1:]:
        ranks[0].merge_state(rank)
    assert ranks[0].compute() == pytest.approx(whole.compute(), rel=1e-12)


def test_pass_at_k_averages_prompts_and_not_batches():
    metric = ValidationStatistics()
    metric.update(scored([1.0, 1.0], 2))
    metric.update(scored([0.0] * 6, 2))
    assert metric.compute()["pass@2"] == 0.25


def test_the_threshold_is_included():
    rollout = scored([0.4, 0.5, 0.6, 1.0], 1)
    passed = []
    for threshold in (0.5, 0.50001, 1.0):
        metric = ValidationStatistics(threshold)
        metric.update(rollout)
        passed.append(metric.compute()["pass@1"])
    assert passed == [0.75, 0.5, 0.25]


def test_reset_forgets_the_samples_per_prompt_too():
    metric = ValidationStatistics()
    metric.update(scored([1.0] * 4, 4))
    metric.reset()
    metric.update(scored([0.0, 1.0], 1))
    values = metric.compute()
    assert values["pass@1"] == 0.5
    assert "pass@2" not in values


def test_without_prompts_there_is_nothing():
    metric = ValidationStatistics()
    metric._update_count = 1
    assert metric.compute() == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_counts_are_right_in_a_module_of_low_precision(dtype):
    module = torch.nn.Module()
    module.statistics = ValidationStatistics()
    module.to(dtype)
    module.statistics.update(scored([1.0] * 999 + [0.0], 1))
    assert module.statistics.compute()["reward/mean"] == 0.999
    assert math.isclose(module.statistics.compute()["pass@1"], 0.999)


def test_dropped_samples_count_neither_as_passed_nor_as_failed():
    nan = math.nan
    metric = ValidationStatistics()
    metric.update(scored([1.0, nan, 0.0, nan, nan, nan, nan, 1.0, nan, nan, nan, nan], 4, truncated=(1, 7)))
    assert metric.compute() == {
        "reward/mean": pytest.approx(2 / 3),
        "reward/dropped_fraction": pytest.approx(0.75),
        "completions/mean_length": 1.0,
        "completions/truncated_fraction": pytest.approx(2 / 12),
        "pass@1": (1 / 2 + 1) / 2,
        "avg@4": (1 / 2 + 1) / 2,
        "pass@2": 1.0,
    }


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, math.nan]), min_size=4, max_size=4), min_size=1, max_size=5))
def test_pass_at_k_is_taken_over_the_prompts_with_enough_samples(groups):
    metric = ValidationStatistics()
    metric.update(scored([reward for group in groups for reward in group], 4))
    result = metric.compute()
    for k in (1, 2, 4):
        kept = [[reward for reward in group if not math.isnan(reward)] for group in groups]
        chances = []
        for group in kept:
            choices = [any(choice) for choice in itertools.combinations(group, k)]
            chances += [sum(choices) / len(choices)] if choices else []
        if chances:
            assert result[f"pass@{k}"] == pytest.approx(sum(chances) / len(chances))
        else:
            assert f"pass@{k}" not in result


@pytest.mark.parametrize(
    ("answers", "passed", "k", "expected"),
    [
        ("aab", [True, True, False], 3, 1.0),
        ("abb", [True, False, False], 3, 0.0),
        ("ab", [True, False], 2, 0.5),  # a tie
        ("abc", [True, False, False], 3, 1 / 3),
        ("aabb" + "abbb", [True, True, False, False, True, False, False, False], 4, 0.25),  # a tie, and a loss
        ("aabbb", [True, True, False, False, False], 4, 0.5),  # the last sample is left over
        ([None, None, "a"], [False, False, True], 3, 1.0),  # those without an answer do not vote
        ([None, None], [False, True], 2, 0.0),
        ("aaa", [True, False, True], 3, 2 / 3),  # a reward that looks at more than the answer
    ],
)
def test_majority_worked_by_hand(answers, passed, k, expected):
    assert majority_at_k(list(answers), passed, k) == pytest.approx(expected)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), min_size=4, max_size=16))
def test_majority_of_one_is_the_mean(samples):
    answers, passed = zip(*samples, strict=True)
    assert majority_at_k(answers, passed, 1) == pytest.approx(sum(passed) / len(passed))


def test_majority_is_reported_from_four_votes_on_if_there_are_answers():
    rollout = scored([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0], 4)
    without = ValidationStatistics()
    without.update(rollout)
    assert not [name for name in without.compute() if name.startswith("maj")]
    rollout.answers = ["5", "6", "5", "5", "7", "7", None, "8"]
    metric = ValidationStatistics()
    metric.update(rollout)
    assert {k: v for k, v in metric.compute().items() if k.startswith("maj")} == {"maj@4": 0.5}


def test_a_subset_counts_its_prompts_alone():
    rollout = scored([1.0, 0.0, 1.0, 1.0, 0.0, 0.0], 2, [1, 2, 3, 4, 5, 6], truncated=(5,))
    part, whole = ValidationStatistics(), ValidationStatistics()
    part.update(rollout, [0, 2])
    whole.update(scored([1.0, 0.0, 0.0, 0.0], 2, [1, 2, 5, 6], truncated=(3,)))
    assert part.compute() == whole.compute()
    empty = ValidationStatistics()
    empty.update(rollout, [])
    assert empty.compute() == {}
