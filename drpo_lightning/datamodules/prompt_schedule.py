"""Which prompts every rollout takes."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
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

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The data set."""
        return self.stream.rows

    def row_numbers(self, slots: range) -> list[int]:
        """Rows of the data set that are taken for some prompts of a rollout.

        Args:
            slots: the prompts by their number, `num_prompts` in every rollout.
        """
        if self.curriculum is None:
            return [self.stream.row_number(slot) for slot in slots]
        taken, _ = self._before[slots.start // self.num_prompts].take(
            self.curriculum, self.stream.row_number, self.num_prompts
        )
        return [taken[slot % self.num_prompts] for slot in slots]

    def add(self, rollout: int, samples: Sequence[Sample]) -> None:
        """Notes how a rollout went.

        Args:
            rollout: its number, from 0.
            samples: of all ranks, in their order.
        """
        if self.curriculum is not None:
            before = self._before[rollout]
            _, after = before.take(self.curriculum, self.stream.row_number, self.num_prompts)
            self._before = {rollout: before, rollout + 1: after.with_rewards(self.curriculum, samples)}

    def metrics(self, rollout: int) -> dict[str, float]:
        """Figures of the data set after some rollouts, the same on all ranks.

        Args:
            rollout: how many there have been.
        """
        num_rows = len(self.rows)
        if self.curriculum is None:
            return {"data/passes": rollout * self.num_prompts / num_rows}
        known = self._before[rollout]
        begun = self._before[rollout - 1].position if rollout - 1 in self._before else known.position
        passed = known.position - begun
        return {
            "data/passes": known.position / num_rows,
            **({"data/skipped_fraction": 1 - self.num_prompts / passed} if passed else {}),
            **known.metrics(self.curriculum, num_rows),
        }

    def state_dict(self, rollout: int) -> dict[str, Any]:
        """What a checkpoint keeps before a rollout, by its number; empty without a curriculum."""
        if self.curriculum is None:
            return {}
        return {"num_rows": len(self.rows), "digest": self._digest, **asdict(self._before[rollout])}

    @cached_property
    def _digest(self) -> str:
        """Of the prompts in their order."""
        prompts = json.dumps([row["prompt"] for row in self.rows])
        return hashlib.sha256(prompts.encode()).hexdigest()

    def load_state_dict(self, state_dict: dict[str, Any], rollout: int) -> None:
        """Takes up `state_dict`; a curriculum that a checkpoint knows nothing of begins where the rollouts would.

        Raises:
            SettingError: if the pass rates are those of another data set.
        """
        if not state_dict:
            self._before = {rollout: PassRates(position=rollout * self.num_prompts)}
            return
        known = dict(state_dict)
        num_rows, digest = known.pop("num_rows"), known.pop("digest")
        if digest != self._digest:
            raise SettingError(
                f"`data.prompts` has {len(self.rows)} rows, and had {num_rows} in the run of the checkpoint, with "
                "other prompts or in another order; its pass rates are by row: resume with the same prompts, or "
                "without `data.curriculum`"
            )
        self._before = {rollout: PassRates(**known)}
