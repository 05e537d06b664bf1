"""Dynamic sampling: prompts whose samples teach nothing are replaced by the next ones of the stream."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from drpo_lightning.batch import Rollout
from drpo_lightning.datamodules.prompt_schedule import Sample
from drpo_lightning.datamodules.rollout_parts import with_groups


class DynamicSample(NamedTuple):
    """What came of the replacements.

    Attributes:
        rollout: this rank's, with the fresh prompts in the places of others.
        num_taken: prompts that all ranks have sampled.
        samples: of all of them, replaced or not, on all ranks: the same whatever their number.
        statistics: the figures that are logged, the same on every rank: see `RolloutStatistics`.
    """

    rollout: Rollout
    num_taken: int
    samples: list[Sample]
    statistics: dict[str, float]


def replace_groups(
    rollout: Rollout,
    sample: Callable[[Sequence[int]], Rollout],
    *,
    num_prompts: int,
    max_rounds: int,
    rank: int,
    of_all_ranks: Callable[[Any], list[Any]],
) -> DynamicSample:
    """Replaces prompts without a signal, see `Rollout.has_signal`, until there are none. Collective over ranks.

    The first prompt without a signal, over all ranks, is replaced by the first that was not taken yet, and so on, so
    that a rollout does not depend on the number of ranks. What has no signal after the last round stays.

    Args:
        rollout: this rank's, scored.
        sample: samples and scores the prompts at some places of the rollout, from `num_prompts` on. Collective.
        num_prompts: prompts of the rollout, over all ranks.
        max_rounds: how often replacements are sampled at most.
        rank: this rank.
        of_all_ranks: gathers a value from every rank, in their order.

    Source: Yu et al., DAPO: An Open-Source LLM Reinforcement Learning System at Scale, arXiv 2503.14476, section 3.2.
    """
    started = time.perf_counter()
    samples = _gathered(rollout, of_all_ranks)
    taken, rounds, discarded_tokens = num_prompts, 0, 0
    for _ in range(max_rounds):
        groups = (~rollout.has_signal).nonzero().flatten().tolist()
        counts = of_all_ranks(len(groups))
        if not any(counts):
            break
        rounds += 1
        first = taken + sum(counts[:rank])
        taken += sum(counts)
        fresh = sample(range(first, first + len(groups)))
        samples += _gathered(fresh, of_all_ranks)
        if groups:
            before = rollout.num_completion_tokens + fresh.num_completion_tokens
            rollout = with_groups(rollout, groups, fresh)
            discarded_tokens += before - rollout.num_completion_tokens
    rewards = [reward for _, reward in samples if not math.isnan(reward)]
    statistics = {
        "rounds": float(rounds),
        "discarded_fraction": 1 - num_prompts / taken,
        "discarded_tokens": float(sum(of_all_ranks(discarded_tokens))),
        "seconds": time.perf_counter() - started,
    }
    if rewards:
        statistics["reward_mean"] = sum(rewards) / len(rewards)
    return DynamicSample(rollout, taken, samples, statistics)


def _gathered(rollout: Rollout, of_all_ranks: Callable[[Any], list[Any]]) -> list[Sample]:
    """Row and reward of every sample on all ranks."""
    return [sample for part in of_all_ranks(_samples(rollout)) for sample in part]


def _samples(rollout: Rollout) -> list[Sample]:
    """Row of the data set and reward of every sample, NaN if it is dropped."""
    return list(zip(rollout.prompt_numbers, rollout.rewards.tolist(), strict=True))
