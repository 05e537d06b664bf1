"""What a reward is, and how the rewards of a completion become one number."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class RewardBatch:
    """What a reward gets to see; every list has one entry per completion.

    Args:
        prompts: text of each prompt.
        completions: decoded text of each completion, without special tokens.
        completion_ids: token ids of each completion.
        finish_reasons: `stop` after an end-of-sequence token, `length` if it was cut off.
        columns: the data set's other columns, such as the answer.
    """

    prompts: Sequence[str]
    completions: Sequence[str]
    completion_ids: Sequence[Sequence[int]]
    finish_reasons: Sequence[Literal["stop", "length"]]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.completions)

    def column(self, name: str) -> Sequence[Any]:
        """A column of the data set.

        Raises:
            KeyError: naming the columns that there are.
        """
        if name not in self.columns:
            raise KeyError(f"the data set has no column {name!r}; it has {sorted(self.columns)}")
        return self.columns[name]


class Reward(ABC):
    """Scores completions.

    Attributes:
        name: what the reward is logged as, `reward/<name>/mean`.
        weight: its factor in the sum of all rewards.
        required_columns: columns of the data set that it cannot do without; a run without them does not start.
    """

    name: str
    weight: float
    required_columns: Sequence[str] = ()

    @abstractmethod
    def score(self, batch: RewardBatch) -> Sequence[float | None]:
        """One finite float per completion, or None where the reward does not apply."""


class RewardError(RuntimeError):
    """A reward raised, or returned something that is no score."""


def score_rewards(rewards: Sequence[Reward], batch: RewardBatch) -> dict[str, Float[Tensor, " samples"]]:
    """Scores completions by every reward.

    Args:
        rewards: the rewards, of different names.
        batch: the completions.

    Returns:
        The scores by name of the reward, NaN where it does not apply.

    Raises:
        RewardError: if a reward raises, returns the wrong number of scores, or one that is not a finite float.
    """
    names = [reward.name for reward in rewards]
    if len(set(names)) != len(names):
        raise RewardError(f"rewards must have different names, got {names}; set `name` on one of them")
    return {reward.name: _checked_scores(reward, batch) for reward in rewards}


def _checked_scores(reward: Reward, batch: RewardBatch) -> Float[Tensor, " samples"]:
    try:
        scores: Any = reward.score(batch)
        if isinstance(scores, Iterable):
            scores = list(scores)  # a generator of scores raises here
    except Exception as error:
        raise RewardError(f"reward {reward.name!r} raised {error!r}; {_culprit(reward, batch)}") from error
    if not isinstance(scores, list):
        raise RewardError(f"reward {reward.name!r} must return a list of scores, got {type(scores).__name__}")
    if len(scores) != len(batch):
        raise RewardError(f"reward {reward.name!r} returned {len(scores)} scores for {len(batch)} completions")
    for i, score in enumerate(scores):
        if score is not None and (not isinstance(score, int | float) or not math.isfinite(score)):
            raise RewardError(
                f"reward {reward.name!r} returned {score!r}, which is neither a finite float nor None, "
                f"for {_sample(batch, i)}"
            )
    return torch.tensor([math.nan if score is None else float(score) for score in scores])


def _culprit(reward: Reward, batch: RewardBatch) -> str:
    """Names the first completion that makes the reward raise, by scoring them one at a time."""
    for i in range(len(batch)):
        one = slice(i, i + 1)
        single = RewardBatch(
            prompts=batch.prompts[one],
            completions=batch.completions[one],
            completion_ids=batch.completion_ids[one],
            finish_reasons=batch.finish_reasons[one],
            columns={name: values[one] for name, values in batch.columns.items()},
        )
        try:
            reward.score(single)
        except Exception:  # noqa: BLE001 - a user's code may raise anything; the first error is the one reported
            return f"it does so for {_sample(batch, i)}"
    return f"no single completion of the {len(batch)} makes it raise"


def _sample(batch: RewardBatch, i: int) -> str:
    row = {name: values[i] for name, values in batch.columns.items()}
    return f"prompt {batch.prompts[i]!r}, completion {batch.completions[i]!r}, columns {row!r}"


def combine_rewards(
    parts: Mapping[str, Float[Tensor, " samples"]], weights: Mapping[str, float]
) -> Float[Tensor, " samples"]:
    """Weighted sum of the rewards of each completion, over those that apply.

    Args:
        parts: scores by name, NaN where a reward does not apply.
        weights: factor by name.

    Raises:
        RewardError: if no reward applies to some completion: it would silently count as 0.
    """
    scores = torch.stack(list(parts.values()))
    if (nowhere := scores.isnan().all(dim=0)).any():
        raise RewardError(f"no reward applies to completion {int(nowhere.nonzero()[0])}: all returned None")
    weight = torch.tensor([weights[name] for name in parts])
    return (scores.nan_to_num(nan=0.0) * weight[:, None]).sum(dim=0)
