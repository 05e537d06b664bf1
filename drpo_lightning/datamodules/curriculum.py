"""A curriculum by pass rate: which prompts of the stream a rollout takes, by how the policy has done on them."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PassRateCurriculum:
    """Leaves out prompts that the policy passes too often or too rarely: all samples alike give no gradient.

    A prompt's pass rate is taken over its last `num_samples` samples, of however many rollouts; one with fewer is
    always taken. A prompt that is left out is passed over in the stream, and taken again after `max_skips` times in a
    row, since the policy may have changed.

    Args:
        min_rate: lowest pass rate of a prompt that is taken; 0 takes prompts that never pass.
        max_rate: highest pass rate of a prompt that is taken; 1 takes prompts that always pass.
        num_samples: samples that the rate is taken over.
        pass_threshold: reward from which on a sample has passed.
        max_skips: times that the stream comes to a prompt in vain before it is taken again.

    Raises:
        ValueError: if a setting is out of range.
    """

    min_rate: float = 0.0
    max_rate: float = 0.99
    num_samples: int = 16
    pass_threshold: float = 1.0
    max_skips: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.min_rate <= self.max_rate <= 1:
            raise ValueError(
                "`curriculum.min_rate` and `curriculum.max_rate` must be in order within [0, 1], got "
                f"{self.min_rate} and {self.max_rate}"
            )
        for name in ("num_samples", "max_skips"):
            if getattr(self, name) < 1:
                raise ValueError(f"`curriculum.{name}` must be at least 1, got {getattr(self, name)}")

    def verdict(self, outcomes: str) -> int:
        """1 for a prompt that passes too often, -1 for one that does so too rarely, 0 for one that is taken.

        Args:
            outcomes: its last samples, `1` for each that passed and `0` for each that did not.
        """
        if len(outcomes) < self.num_samples:
            return 0
        rate = outcomes.count("1") / len(outcomes)
        return (rate > self.max_rate) - (rate < self.min_rate)


@dataclass(frozen=True)
class PassRates:
    """What a curriculum knows between two rollouts. Not changed: the next one is made of it.

    Args:
        position: where the next rollout begins in the stream of prompts.
        outcomes: last samples of each prompt by the number of its row, the oldest first, see
            `PassRateCurriculum.verdict`.
        skips: how often in a row each prompt was left out, by the number of its row; without zeros.
    """

    position: int = 0
    outcomes: dict[int, str] = field(default_factory=dict)
    skips: dict[int, int] = field(default_factory=dict)

    def take(
        self, curriculum: PassRateCurriculum, row_number: Callable[[int], int], count: int
    ) -> tuple[list[int], "PassRates"]:
        """The next prompts that the curriculum takes.

        Args:
            curriculum: the settings.
            row_number: the row at a position of the stream.
            count: how many prompts.

        Returns:
            Numbers of the rows, and what is known after them.
        """
        position, skips = self.position, dict(self.skips)
        taken: list[int] = []
        while len(taken) < count:
            row = row_number(position)
            position += 1
            if curriculum.verdict(self.outcomes.get(row, "")) and skips.get(row, 0) < curriculum.max_skips:
                skips[row] = skips.get(row, 0) + 1
            else:
                skips.pop(row, None)
                taken.append(row)
        return taken, PassRates(position, self.outcomes, skips)

    def with_rewards(self, curriculum: PassRateCurriculum, samples: Iterable[tuple[int, float]]) -> "PassRates":
        """What is known with some more samples.

        Args:
            curriculum: the settings.
            samples: number of the row and reward of each, the oldest first; NaN does not count.
        """
        outcomes = dict(self.outcomes)
        for row, reward in samples:
            if not math.isnan(reward):
                passed = "1" if reward >= curriculum.pass_threshold else "0"
                outcomes[row] = (outcomes.get(row, "") + passed)[-curriculum.num_samples :]
        return PassRates(self.position, outcomes, self.skips)

    def metrics(self, curriculum: PassRateCurriculum, num_rows: int) -> dict[str, float]:
        """Shares of a data set's rows that pass too often, too rarely, or are not judged for lack of samples."""
        verdicts = [curriculum.verdict(outcomes) for outcomes in self.outcomes.values()]
        judged = sum(len(outcomes) >= curriculum.num_samples for outcomes in self.outcomes.values())
        return {
            "data/too_easy_fraction": verdicts.count(1) / num_rows,
            "data/too_hard_fraction": verdicts.count(-1) / num_rows,
            "data/unjudged_fraction": 1 - judged / num_rows,
        }
