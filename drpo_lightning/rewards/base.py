"""What a reward is: from the text of a completion to a number, or to a failure that says why there is none."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

LARGEST_SCORE = 3.4e38
"""Beyond it float32, which rewards are kept in, has infinity."""


@dataclass(frozen=True)
class RewardSample:
    """One completion, as a reward sees it.

    Args:
        prompt: text of the prompt.
        completion: decoded text, without special tokens.
        completion_ids: its token ids.
        finish_reason: `stop` after an end-of-sequence token, `length` if it was cut off.
        columns: the data set's other columns, such as the answer.
    """

    prompt: str
    completion: str
    completion_ids: Sequence[int]
    finish_reason: Literal["stop", "length"]
    columns: Mapping[str, Any]

    def __str__(self) -> str:
        return f"prompt {self.prompt!r}, completion {self.completion!r}, columns {dict(self.columns)!r}"


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

    def sample(self, i: int) -> RewardSample:
        """The i-th completion."""
        return RewardSample(
            prompt=self.prompts[i],
            completion=self.completions[i],
            completion_ids=self.completion_ids[i],
            finish_reason=self.finish_reasons[i],
            columns={name: values[i] for name, values in self.columns.items()},
        )

    def single(self, i: int) -> "RewardBatch":
        """The i-th completion as a batch of its own."""
        one = slice(i, i + 1)
        return RewardBatch(
            prompts=self.prompts[one],
            completions=self.completions[one],
            completion_ids=self.completion_ids[one],
            finish_reasons=self.finish_reasons[one],
            columns={name: values[one] for name, values in self.columns.items()},
        )


@dataclass(frozen=True)
class RewardFailure:
    """Why a completion has no score.

    Args:
        kind: `timeout` if it took too long, `error` for everything else.
        reason: in a sentence that follows the reward's name.
        output: the last lines that the reward wrote, if they were kept.
    """

    kind: Literal["error", "timeout"]
    reason: str
    output: str = ""


RewardOutcome = float | None | RewardFailure
"""What a reward says of a completion: a finite float, None where it does not apply, or why there is no score."""


@dataclass(frozen=True)
class FailurePolicy:
    """What becomes of a completion that a reward fails on.

    Args:
        on_failure: `raise` ends the run; `drop_sample` leaves the completion out of its group and of the training;
            `score` gives it `failure_score`.
        failure_score: the score of a failure, in units of the reward.

    Raises:
        ValueError: if there is no such policy, or the score is missing, not finite, or of no use.
    """

    on_failure: Literal["raise", "drop_sample", "score"] = "raise"
    failure_score: float | None = None

    def __post_init__(self) -> None:
        if self.on_failure not in ("raise", "drop_sample", "score"):
            raise ValueError(f"`on_failure` must be one of ['raise', 'drop_sample', 'score'], got {self.on_failure!r}")
        if (self.on_failure == "score") != (self.failure_score is not None):
            raise ValueError(
                f"`failure_score` must be set with `on_failure: score`, and only then, got {self.failure_score} with "
                f"{self.on_failure!r}"
            )
        if self.failure_score is not None:
            try:
                checked_score(self.failure_score)
            except ValueError:
                raise ValueError(f"`failure_score` must be a finite float, got {self.failure_score!r}") from None


class Reward(ABC):
    """Scores completions.

    Attributes:
        name: what the reward is logged as, `reward/<name>/mean`.
        weight: its factor in the sum of all rewards.
        required_columns: columns of the data set that it cannot do without; a run without them does not start.
        failure_policy: what becomes of its failures, which are counted; None for a reward that returns none.
    """

    name: str
    weight: float
    required_columns: Sequence[str] = ()
    failure_policy: FailurePolicy | None = None

    @abstractmethod
    def score(self, batch: RewardBatch) -> Sequence[RewardOutcome]:
        """One finite float per completion, or None where the reward does not apply.

        A reward with a `failure_policy` may return a `RewardFailure` in place of a score.
        """

    def check_row(self, row: Mapping[str, Any]) -> None:  # noqa: B027
        """Raises `ValueError` if no completion of this row of the data set could be scored; asked at the start."""

    def answers(self, batch: RewardBatch) -> Sequence[str | None] | None:  # noqa: ARG002
        """The final answer of each completion, for majority votes: equal texts for equal answers, None for no answer.

        None in place of a list, the default, if the reward has no notion of an answer.
        """
        return None

    def close(self) -> None:  # noqa: B027 - most have nothing to give back
        """Gives back what scoring has taken: processes, a model. Scoring again takes it again."""


class RewardError(RuntimeError):
    """A reward raised, or returned something that is no score."""


def checked_score(score: Any) -> float | None:  # noqa: ANN401
    """A score as a float; None stays None.

    Raises:
        ValueError: if it is neither a finite float nor None; the message says what it is.
    """
    if score is None:
        return None
    if not isinstance(score, int | float) or not math.isfinite(score) or abs(score) > LARGEST_SCORE:
        raise ValueError(f"returned {score!r}, which is neither a finite float nor None")
    return float(score)
