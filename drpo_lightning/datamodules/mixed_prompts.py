"""Several data sets as one."""

import math
from collections.abc import Mapping
from typing import Any

from drpo_lightning.datamodules.prompts import PromptSource
from drpo_lightning.errors import SettingError


class MixedPrompts(PromptSource):
    """The rows of several data sets, with the name of theirs in the column `data_set`.

    In the training every row comes equally often, or, with `weights`, every data set as often as its weight says: each
    is then gone through in shuffled passes of its own. A validation takes every row once, whatever the weights.

    Args:
        data_sets: the data sets by name.
        weights: share of each data set in the prompts, by name, in any unit; counted in thousandths.

    Raises:
        ValueError: if there are no data sets, or the weights are not positive numbers, one for each.
    """

    def __init__(self, data_sets: dict[str, PromptSource], weights: dict[str, float] | None = None) -> None:
        if not data_sets:
            raise ValueError("`data_sets` must name at least one data set, got none")
        if any(source.weights for source in data_sets.values()):
            raise ValueError("`data_sets` must have no weights of their own: list all data sets side by side")
        if weights is not None and weights.keys() != data_sets.keys():
            raise ValueError(f"`weights` must be given for {sorted(data_sets)}, got {sorted(weights)}")
        for name, weight in (weights or {}).items():
            if not 0 < weight < math.inf:
                raise ValueError(f"`weights` must be positive, got {weight} for {name!r}")
        self.data_sets = data_sets
        self._weights = weights or {}

    @property
    def weights(self) -> Mapping[str, float]:
        """See `PromptSource.weights`."""
        return self._weights

    def load(self) -> list[dict[str, Any]]:
        """See `PromptSource.load`."""
        rows = []
        for name, source in self.data_sets.items():
            try:
                rows += [{**row, "data_set": name} for row in source.load()]
            except SettingError as error:
                raise SettingError(f"`data_sets.{name}`: {error}") from error
        return rows
