"""Which prompts every rollout takes."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

from drpo_lightning.datamodules.curriculum import PassRateCurriculum, PassRates
from drpo_lightning.datamodules.prompt_stream import PromptStream
from drpo_lightning.errors import SettingError

Sample = tuple[int, float]
"""Number of the row, and reward."""


class PromptSchedule:
    """The prompts of every rollout, the same on all ranks: the next ones of the stream that the curriculum takes.

    Args:
        stream: the stream of prompts.
        num_prompts: prompts of a rollout, over all ranks.
        curriculum: which prompts are left out; None takes all.
    """

    def __init__(self, stream: PromptStream, *, num_prompts: int, curriculum: PassRateCurriculum | None = None) -> None:
        self.stream = stream
        self.num_prompts = num_prompts
        self.curriculum = curriculum
        self._before = {0: PassRates()}
        """What is known before a rollout, by its number; of the last two, since a rollout may be broken off."""
        self._num_taken = num_prompts

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The data set."""
        return self.stream.rows

    def _known(self, rollout: int) -> PassRates:
        """What is known before a rollout; those of which nothing was noted have taken `num_prompts` each."""
        noted = max(number for number in self._before if number <= rollout)
        known = self._before[noted]
        return replace(known, position=known.position + (rollout - noted) * self.num_prompts)

    def _take(self, known: PassRates, count: int) -> tuple[list[int], PassRates]:
        """The next prompts, and what is known after them."""
        if self.curriculum is not None:
            return known.take(self.curriculum, self.stream.row_number, count)
        end = known.position + count
        return [self.stream.row_number(position) for position in range(known.position, end)], PassRates(end)

    def row_numbers(self, rollout: int, places: Sequence[int]) -> list[int]:
        """Rows of the data set that are taken for some prompts of a rollout.

        Args:
            rollout: its number, from 0.
            places: of the prompts among those of all ranks, from 0; from `num_prompts` on they replace others.
        """
        taken, _ = self._take(self._known(rollout), max(places, default=-1) + 1)
        return [taken[place] for place in places]

    def add(self, rollout: int, samples: Sequence[Sample], *, num_taken: int | None = None) -> None:
        """Notes how a rollout went.

        Args:
            rollout: its number, from 0.
            samples: of all ranks, in their order.
            num_taken: prompts that it has taken, with those that replaced others; by default `num_prompts`.
        """
        before = self._known(rollout)
        self._num_taken = num_taken or self.num_prompts
        _, after = self._take(before, self._num_taken)
        if self.curriculum is not None:
            after = after.with_rewards(self.curriculum, samples)
        self._before = {rollout: before, rollout + 1: after}

    def metrics(self, rollout: int) -> dict[str, float]:
        """Figures of the data set after some rollouts, the same on all ranks.

        Args:
            rollout: how many there have been.
        """
        num_rows, known = len(self.rows), self._known(rollout)
        metrics = {"data/passes": known.position / num_rows}
        if self.curriculum is None:
            return metrics
        if rollout - 1 in self._before:
            passed = known.position - self._before[rollout - 1].position
            metrics["data/skipped_fraction"] = 1 - self._num_taken / passed
        return metrics | known.metrics(self.curriculum, num_rows)

    def state_dict(self, rollout: int) -> dict[str, Any]:
        """What a checkpoint keeps before a rollout, by its number."""
        known = self._known(rollout)
        if self.curriculum is None:
            return {"position": known.position}
        return {"num_rows": len(self.rows), "digest": self._digest, **asdict(known)}

    @cached_property
    def _digest(self) -> str:
        """Of the prompts in their order."""
        prompts = json.dumps([row["prompt"] for row in self.rows])
        return hashlib.sha256(prompts.encode()).hexdigest()

    def load_state_dict(self, state_dict: dict[str, Any], rollout: int) -> None:
        """Takes up `state_dict`; what it has nothing of begins where the rollouts would.

        Raises:
            SettingError: if the pass rates are those of another data set.
        """
        known = {"position": rollout * self.num_prompts, **state_dict}
        num_rows, digest = known.pop("num_rows", None), known.pop("digest", None)
        if self.curriculum is None:
            known = {"position": known["position"]}
        elif digest not in (None, self._digest):
            raise SettingError(
                f"`data.prompts` has {len(self.rows)} rows, and had {num_rows} in the run of the checkpoint, with "
                "other prompts or in another order; its pass rates are by row: resume with the same prompts, or "
                "without `data.curriculum`"
            )
        self._before = {rollout: PassRates(**known)}
