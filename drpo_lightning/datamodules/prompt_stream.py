"""The endless stream of prompts that rollouts are taken from."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from drpo_lightning.datamodules.seeds import seed_of
from drpo_lightning.errors import SettingError

BLOCK = 1000
"""Positions among which data sets with weights have exactly their shares."""


class PromptStream:
    """Shuffled passes over the rows of a data set, one after the other. Row numbers by position, the same on any rank.

    With weights the rows are those of several data sets: of every 1000 positions each has as many as its weight says,
    in random order, and each goes through shuffled passes of its own.

    Args:
        rows: the data set; with weights, the column `data_set` says which one.
        seed: of the order of every pass.
        period: positions after which the stream begins again from its first row; None for never.
        weights: of the data sets, by name; empty for every row equally often.

    Raises:
        SettingError: if a data set with a weight has no rows, or too small a weight to ever be taken from.
    """

    def __init__(
        self,
        rows: list[dict[str, Any]],
        *,
        seed: int,
        period: int | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.rows = rows
        self.period = period
        self._mixture = _Mixture(weights, seed) if weights else None
        everything = range(len(rows))
        self._passes = {
            name: _Passes([i for i in everything if rows[i]["data_set"] == name], seed, "prompts", name)
            for name in weights or {}
        } or {"": _Passes(everything, seed, "prompts")}
        for name, passes in self._passes.items():
            if not passes.numbers:
                raise SettingError(f"`data.prompts`: the data set {name!r} has a weight, but no rows")

    def row_number(self, position: int) -> int:
        """Which row of the data set stands at a position."""
        place = position if self.period is None else position % self.period
        name = ""
        if self._mixture is not None:
            name, place = self._mixture.place(place)
        return self._passes[name].row_number(place)


class _Passes:
    """Shuffled passes over some rows, one after the other.

    Args:
        numbers: of the rows.
        seed_parts: what the seed of a pass is made of, with its number.
    """

    def __init__(self, numbers: Sequence[int], *seed_parts: object) -> None:
        self.numbers = numbers
        self.seed_parts = seed_parts
        self._order: tuple[int, list[int]] = (-1, [])

    def row_number(self, place: int) -> int:
        number, place = divmod(place, len(self.numbers))
        if self._order[0] != number:
            self._order = (number, _shuffled(len(self.numbers), *self.seed_parts, number))
        return self.numbers[self._order[1][place]]


class _Mixture:
    """Which data set every position takes, in blocks that hold exactly their shares.

    Args:
        weights: of the data sets, by name.
        seed: of the order in every block.
    """

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        self.counts = _shares(weights)
        self.seed = seed
        self._block: tuple[int, list[tuple[str, int]]] = (-1, [])

    def place(self, position: int) -> tuple[str, int]:
        """The data set of a position, and how many positions before take the same."""
        number, place = divmod(position, BLOCK)
        if self._block[0] != number:
            self._block = (number, self._places(number))
        return self._block[1][place]

    def _places(self, number: int) -> list[tuple[str, int]]:
        names = [name for name, count in self.counts.items() for _ in range(count)]
        before = Counter({name: number * count for name, count in self.counts.items()})
        places = []
        for i in _shuffled(BLOCK, self.seed, "mixture", number):
            places.append((names[i], before[names[i]]))
            before[names[i]] += 1
        return places


def _shares(weights: Mapping[str, float]) -> dict[str, int]:
    """Positions of a block that each data set has, by the method of the largest remainder."""
    total = sum(weights.values())
    exact = {name: BLOCK * weight / total for name, weight in weights.items()}
    counts = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: BLOCK - sum(counts.values())]:
        counts[name] += 1
    for name, count in counts.items():
        if not count:
            raise SettingError(f"`data.prompts`: the weight of {name!r} is less than a thousandth of all weights")
    return counts


def _shuffled(count: int, *seed_parts: object) -> list[int]:
    generator = torch.Generator().manual_seed(seed_of(*seed_parts))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order
