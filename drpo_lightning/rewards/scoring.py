"""How a batch of completions is scored by every reward, and how the rewards of a completion become one number."""

import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from drpo_lightning.errors import SettingError
from drpo_lightning.rewards.base import (
    Reward,
    RewardBatch,
    RewardError,
    RewardFailure,
    RewardOutcome,
    checked_score,
)


@dataclass(frozen=True)
class RewardScores:
    """What the rewards say of a batch of completions.

    Args:
        parts: scores by name of the reward, NaN where it does not apply or the sample is dropped by it.
        errors: True where a reward failed for any reason but time, by name; of rewards with a `failure_policy`.
        timeouts: True where a reward took too long, likewise.
        dropped: True on the samples that are left out of the training.
        failures: why there is no score, by name and number of the sample; of rewards with a `failure_policy`.
        seconds: how long each reward took, by name.
    """

    parts: dict[str, Float[Tensor, " samples"]]
    errors: dict[str, Bool[Tensor, " samples"]]
    timeouts: dict[str, Bool[Tensor, " samples"]]
    dropped: Bool[Tensor, " samples"]
    failures: dict[str, dict[int, RewardFailure]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def score_rewards(rewards: Sequence[Reward], batch: RewardBatch) -> RewardScores:
    """Scores completions by every reward, and treats failures by each reward's policy.

    Args:
        rewards: the rewards, of different names.
        batch: the completions.

    Raises:
        RewardError: if a reward raises, returns the wrong number of scores, one that is not a finite float, or a
            failure where its policy is to raise.
        SettingError: if a reward finds that a setting cannot work.
    """
    names = [reward.name for reward in rewards]
    if len(set(names)) != len(names):
        raise RewardError(f"rewards must have different names, got {names}; set `name` on one of them")
    scores = RewardScores({}, {}, {}, torch.zeros(len(batch), dtype=torch.bool))
    for reward in rewards:
        start = time.perf_counter()
        # A rank may have no prompts to validate, which rewards need not know of.
        outcomes = _checked_outcomes(reward, batch) if len(batch) else []
        scores.seconds[reward.name] = time.perf_counter() - start
        _add_scores(scores, reward, outcomes, batch)
    return scores


def _add_scores(scores: RewardScores, reward: Reward, outcomes: list[RewardOutcome], batch: RewardBatch) -> None:
    """Enters the scores of a reward, by its policy where it failed."""
    failures = {i: outcome for i, outcome in enumerate(outcomes) if isinstance(outcome, RewardFailure)}
    values = [math.nan if outcome is None or isinstance(outcome, RewardFailure) else outcome for outcome in outcomes]
    part = torch.tensor(values, dtype=torch.float32)
    scores.parts[reward.name] = part
    policy = reward.failure_policy
    if policy is None:
        return
    if policy.on_failure == "raise":
        _raise_first(reward, failures, batch)
    errors, timeouts = (
        torch.tensor([i in failures and failures[i].kind == kind for i in range(len(outcomes))], dtype=torch.bool)
        for kind in ("error", "timeout")
    )
    scores.failures[reward.name] = failures
    scores.errors[reward.name], scores.timeouts[reward.name] = errors, timeouts
    if policy.on_failure == "drop_sample":
        scores.dropped.logical_or_(errors | timeouts)
    elif policy.failure_score is not None:
        part[errors | timeouts] = policy.failure_score


def _raise_first(reward: Reward, failures: Mapping[int, RewardFailure], batch: RewardBatch) -> None:
    """Raises for the first failure, if there is one."""
    if not failures:
        return
    i, first = next(iter(failures.items()))
    output = f"\nits last output:\n{first.output}" if first.output else ""
    raise RewardError(
        f"reward {reward.name!r} {first.reason}, for {batch.sample(i)}; it failed on {len(failures)} of {len(batch)} "
        f"completions. `on_failure` drop_sample or score goes on{output}"
    )


def describe_failures(failures: Iterable[RewardFailure]) -> str:
    """Failures in words: how many there are of each reason, the most frequent first."""
    counts = Counter(f"{failure.kind}: {failure.reason}" for failure in failures)
    return "; ".join(f"{count} x {reason}" for reason, count in counts.most_common(3))


def _checked_outcomes(reward: Reward, batch: RewardBatch) -> list[RewardOutcome]:
    try:
        scores: Any = reward.score(batch)
        if isinstance(scores, Iterable):
            scores = list(scores)  # a generator of scores raises here
    except (RewardError, SettingError):
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(f"reward {reward.name!r} raised {error!r}; {_culprit(reward, batch)}") from error
    if not isinstance(scores, list):
        raise RewardError(f"reward {reward.name!r} must return a list of scores, got {type(scores).__name__}")
    if len(scores) != len(batch):
        raise RewardError(f"reward {reward.name!r} returned {len(scores)} scores for {len(batch)} completions")
    may_fail = reward.failure_policy is not None
    outcomes: list[RewardOutcome] = []
    for i, score in enumerate(scores):
        try:
            outcomes.append(score if may_fail and isinstance(score, RewardFailure) else checked_score(score))
        except ValueError as error:
            raise RewardError(f"reward {reward.name!r} {error}, for {batch.sample(i)}") from error
    return outcomes


def _culprit(reward: Reward, batch: RewardBatch) -> str:
    """Names the first completion that makes the reward raise, by scoring them one at a time."""
    for i in range(len(batch)):
        try:
            reward.score(batch.single(i))
        except (Exception, SystemExit):  # noqa: BLE001 - a user's code may raise anything; the first is reported
            return f"it does so for {batch.sample(i)}"
    return f"no single completion of the {len(batch)} makes it raise"


def combine_rewards(
    parts: Mapping[str, Float[Tensor, " samples"]],
    weights: Mapping[str, float],
    dropped: Bool[Tensor, " samples"] | None = None,
) -> Float[Tensor, " samples"]:
    """Weighted sum of the rewards of each completion, over those that apply.

    Args:
        parts: scores by name, NaN where a reward does not apply.
        weights: factor by name.
        dropped: True on completions that have no reward; none by default.

    Returns:
        The sums, finite; NaN on dropped completions.

    Raises:
        RewardError: if no reward applies to some other completion, which would silently count as 0, or a sum is not
            finite in float32.
    """
    scores = torch.stack(list(parts.values()))
    kept = torch.ones(scores.shape[1], dtype=torch.bool) if dropped is None else ~dropped
    if (nowhere := scores.isnan().all(dim=0) & kept).any():
        raise RewardError(f"no reward applies to completion {int(nowhere.nonzero()[0])}: all returned None")
    weight = torch.tensor([weights[name] for name in parts])
    total = (scores.nan_to_num(nan=0.0) * weight[:, None]).sum(dim=0)
    if not (finite := total.isfinite()).all():
        raise RewardError(f"the weighted sum of the rewards of completion {int((~finite).nonzero()[0])} is not finite")
    return torch.where(kept, total, math.nan)


def json_score(value: Tensor) -> float | None:
    """A score as JSON has it: null for one that there is not."""
    return None if value.isnan() else float(value)
