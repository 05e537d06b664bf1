"""Statistics of a rollout: worked by hand, the same over ranks, at the steps completed when it was sampled."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from drpo_lightning.callbacks import ExactMatchReward, FunctionReward, RolloutStatistics
from drpo_lightning.callbacks.rollout_statistics import rollout_metrics
from drpo_lightning.rollout import TransformersEngine

MODULE = SimpleNamespace(device=torch.device("cpu"))


class Ranks:
    """A strategy that reduces with the tensors that other ranks gave."""

    def __init__(self, *others):
        self.others = list(others)
        self.given = []

    def reduce(self, tensor, reduce_op):
        place = len(self.given)
        self.given.append(tensor)
        stack = torch.stack([tensor, *(other.given[place] for other in self.others)])
        return stack.sum(0) if reduce_op == "sum" else stack.amax(0)


def metrics_of(rollout, *other_rollouts):
    others = []
    for other in other_rollouts:
        others.append(Ranks())
        rollout_metrics(SimpleNamespace(strategy=others[-1]), MODULE, other)
    return rollout_metrics(SimpleNamespace(strategy=Ranks(*others)), MODULE, rollout)


def part(rollout, rows, make_rollout):
    return make_rollout(
        prompts=rollout.prompts[rows],
        prompt_ids=rollout.prompt_ids[rows],
        completions=rollout.completions[rows],
        texts=rollout.texts[rows],
        rewards=rollout.rewards[rows],
        reward_parts={name: values[rows] for name, values in rollout.reward_parts.items()},
    )


def test_worked_by_hand(make_rollout):
    parts = {
        "first": torch.tensor([1.0, 0.0, 0.5, 0.5]),
        "second": torch.tensor([float("nan"), 3.0, float("nan"), 1.0]),
        "never": torch.full((4,), float("nan")),
    }
    assert metrics_of(make_rollout(reward_parts=parts)) == {
        "reward/mean": 0.5,
        "reward/std": pytest.approx(0.125**0.5),
        "completions/mean_length": 3.0,
        "completions/max_length": 6.0,
        "completions/truncated_fraction": 0.25,
        "group/zero_std_fraction": 0.5,
        "rollout/staleness_mean": 0.0,
        "rollout/staleness_max": 0.0,
        "tokens": 12.0,
        "reward/first/applies_fraction": 1.0,
        "reward/first/mean": 0.5,
        "reward/second/applies_fraction": 0.5,
        "reward/second/mean": 2.0,
        "reward/never/applies_fraction": 0.0,
    }


def test_staleness_counts_syncs_since_the_oldest_weights_of_a_sample(make_rollout):
    rollout = make_rollout(weights_version=5)
    versions = (5, 2, None, 4)
    rollout.completions = [replace(c, weights_version=v) for c, v in zip(rollout.completions, versions, strict=True)]
    metrics = metrics_of(rollout)
    assert (metrics["rollout/staleness_mean"], metrics["rollout/staleness_max"]) == (1.0, 3.0)


def test_what_a_penalty_takes_off_the_rewards_stands_on_its_own(make_rollout):
    penalized = metrics_of(make_rollout(reference_penalties=torch.tensor([0.5, -0.25, 0.0, 1.0])))
    assert penalized.pop("reward/reference_kl/mean") == pytest.approx(-1.25 / 4)
    assert penalized == metrics_of(make_rollout())


def test_equal_rewards_have_no_spread(make_rollout):
    metrics = metrics_of(make_rollout(rewards=torch.full((4,), 0.1)))
    assert metrics["reward/std"] == pytest.approx(0, abs=1e-6)
    assert metrics["group/zero_std_fraction"] == 1.0


def test_two_ranks_have_the_statistics_of_one(make_rollout):
    rollout = make_rollout(reward_parts={"some": torch.tensor([1.0, float("nan"), float("nan"), float("nan")])})
    halves = [part(rollout, rows, make_rollout) for rows in (slice(0, 2), slice(2, 4))]
    assert metrics_of(*halves) == pytest.approx(metrics_of(rollout))
    assert metrics_of(*reversed(halves)) == pytest.approx(metrics_of(rollout))


def test_dropped_samples_are_in_no_mean_but_are_counted(make_rollout):
    nan = float("nan")
    changes = {
        "rewards": torch.tensor([nan, 0.5, 1.0, nan]),
        "reward_parts": {"some": torch.tensor([nan, 0.5, 1.0, nan]), "other": torch.tensor([9.0, 2.0, nan, 9.0])},
        "reward_errors": {"some": torch.tensor([True, False, False, False])},
        "reward_timeouts": {"some": torch.tensor([False, False, False, True])},
        "reference_penalties": torch.tensor([9.0, -0.5, -0.25, 9.0]),
    }
    rollout = make_rollout(**changes)
    expected = {
        "reward/mean": 0.75,
        "reward/std": pytest.approx(0.25),
        "reward/some/applies_fraction": 1.0,
        "reward/some/mean": 0.75,
        "reward/some/error_fraction": 0.25,
        "reward/some/timeout_fraction": 0.25,
        "reward/dropped_fraction": 0.5,
        "reward/other/applies_fraction": 0.5,
        "reward/other/mean": 2.0,
        "reward/reference_kl/mean": pytest.approx(0.375),
        "completions/mean_length": 3.0,
        "completions/max_length": 6.0,
        "completions/truncated_fraction": 0.25,
        "group/zero_std_fraction": 1.0,
        "rollout/staleness_mean": 0.0,
        "rollout/staleness_max": 0.0,
        "tokens": 12.0,
    }
    assert metrics_of(rollout) == expected
    halves = [
        make_rollout(
            **{name: getattr(rollout, name)[rows] for name in ("prompts", "prompt_ids", "completions", "texts")},
            rewards=rollout.rewards[rows],
            reference_penalties=rollout.reference_penalties[rows],
            **{
                name: {key: values[rows] for key, values in getattr(rollout, name).items()}
                for name in ("reward_parts", "reward_errors", "reward_timeouts")
            },
        )
        for rows in (slice(0, 2), slice(2, 4))
    ]
    assert metrics_of(*halves) == expected


def test_a_rollout_is_logged_at_the_steps_completed_before_it(make_run, make_memory, make_recorder):
    logger, recorder = make_memory(), make_recorder()
    rewards = [
        ExactMatchReward(weight=0.0),
        FunctionReward(lambda completion_ids, **_: [sum(ids) % 3 for ids in completion_ids], name="sum"),
    ]
    make_run(RolloutStatistics(), recorder, trainer={"logger": logger, "max_epochs": 3}, rewards=rewards).fit()
    for i, rollout in enumerate(recorder.rollouts):
        lengths = [len(completion.token_ids) for completion in rollout.completions]
        expected = {
            "reward/mean": rollout.rewards.mean().item(),
            "reward/std": rollout.rewards.std(unbiased=False).item(),
            "reward/sum/mean": rollout.reward_parts["sum"].mean().item(),
            "reward/exact_match/mean": rollout.reward_parts["exact_match"].mean().item(),
            "completions/mean_length": sum(lengths) / 16,
            "completions/max_length": max(lengths),
            "completions/truncated_fraction": sum(c.is_truncated for c in rollout.completions) / 16,
        }
        for name, value in expected.items():
            assert logger.scalars[name][i] == (2 * i, pytest.approx(value, rel=1e-5)), name


def test_speed_is_logged_after_the_updates(make_run, make_memory, make_recorder):
    logger, recorder = make_memory(), make_recorder()
    make_run(RolloutStatistics(), recorder, trainer={"logger": logger, "max_epochs": 2}).fit()
    for name in ("generate", "sync", "reward"):
        assert logger.steps(f"perf/{name}_seconds") == [0, 2]
        assert min(logger.values(f"perf/{name}_seconds")) > 0
    for name in ("perf/update_seconds", "perf/iteration_seconds", "perf/tokens_per_second"):
        assert logger.steps(name) == [2, 4]
    assert logger.scalars["rollout/updates_since_sync"] == [(1, 1), (2, 2), (3, 1), (4, 2)]
    for i, rollout in enumerate(recorder.rollouts):
        update, iteration, speed = (
            logger.values(name)[i]
            for name in ("perf/update_seconds", "perf/iteration_seconds", "perf/tokens_per_second")
        )
        assert 0 < update < iteration
        assert speed == pytest.approx(rollout.num_completion_tokens / iteration)
        assert iteration - update >= logger.values("perf/generate_seconds")[i]


def test_the_start_of_the_engine_is_no_part_of_an_iteration(make_run, make_memory):
    class SlowlyStarting(TransformersEngine):
        def start(self, *args, **kwargs):
            time.sleep(5)
            super().start(*args, **kwargs)

    logger = make_memory()
    data = {"engine": SlowlyStarting()}
    run = make_run(RolloutStatistics(), data=data, trainer={"logger": logger, "max_epochs": 2})
    begun = time.perf_counter()
    run.fit()
    ((step, seconds),) = logger.scalars["perf/start_seconds"]
    assert (step, seconds > 5) == (0, True)
    assert sum(logger.values("perf/iteration_seconds")) < time.perf_counter() - begun - seconds


def test_validation_is_not_taken_for_a_rollout(make_run, make_memory):
    from drpo_lightning.datamodules import ArithmeticPrompts

    logger = make_memory()
    make_run(
        RolloutStatistics(),
        trainer={"logger": logger, "num_sanity_val_steps": -1},
        data={"val_prompts": ArithmeticPrompts("validation", max_operand=9, num_validation=20)},
    ).fit()
    assert logger.steps("reward/mean") == [0]
    assert logger.steps("val/reward/mean") == [0, 2]
