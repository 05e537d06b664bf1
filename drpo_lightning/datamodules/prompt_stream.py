"""The endless stream of prompts that rollouts are taken from."""

from typing import Any

import torch

from drpo_lightning.datamodules.seeds import seed_of


class PromptStream:
    """Shuffled passes over the rows of a data set, one after the other. Row numbers by position, the same on any rank.

    Args:
        rows: the data set.
        seed: of the order of every pass.
        period: positions after which the stream begins again from its first row; None for never.
    """

    def __init__(self, rows: list[dict[str, Any]], *, seed: int, period: int | None = None) -> None:
        self.rows = rows
        self.seed = seed
        self.period = period
        self._order: tuple[int, list[int]] = (-1, [])

    def row_number(self, position: int) -> int:
        """Which row of the data set stands at a position."""
        place = position if self.period is None else position % self.period
        epoch, place = divmod(place, len(self.rows))
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, "prompts", epoch))
            self._order = (epoch, torch.randperm(len(self.rows), generator=generator).tolist())
        return self._order[1][place]
