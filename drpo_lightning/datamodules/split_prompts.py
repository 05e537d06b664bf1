"""A data set as two that share no prompt."""

import json
import random
from collections.abc import Mapping
from typing import Any, Literal

from drpo_lightning.datamodules.prompts import PromptSource
from drpo_lightning.errors import SettingError


class SplitPrompts(PromptSource):
    """A part of a data set: the prompts that are held out for the validation, or all others.

    Rows with the same prompt stay together, so no prompt is in both parts, however often the data set has it.

    Args:
        source: the data set.
        holdout: how many prompts are held out, a number of different prompts or, below 1, a share of them.
        split: `train`, or `validation` for what is held out.
        seed: of the choice. Both parts must have the same `source`, `holdout` and `seed`.

    Raises:
        ValueError: if `holdout` is neither a positive whole number nor between 0 and 1.
    """

    def __init__(
        self,
        source: PromptSource,
        holdout: int | float,
        split: Literal["train", "validation"] = "train",
        seed: int = 0,
    ) -> None:
        if not (0 < holdout < 1 or (holdout >= 1 and holdout % 1 == 0)):
            raise ValueError(f"`holdout` must be a positive whole number, or a share between 0 and 1, got {holdout}")
        self.source = source
        self.holdout = holdout
        self.split = split
        self.seed = seed

    @property
    def weights(self) -> Mapping[str, float]:
        """Those of the data set."""
        return self.source.weights

    def load(self) -> list[dict[str, Any]]:
        """See `PromptSource.load`."""
        rows = self.source.load()
        keys = [json.dumps(row["prompt"]) for row in rows]
        prompts = list(dict.fromkeys(keys))
        count = round(self.holdout * len(prompts)) if self.holdout < 1 else int(self.holdout)
        if not 0 < count < len(prompts):
            raise SettingError(
                f"`holdout` {self.holdout} is {count} of {len(prompts)} different prompts: both parts must have some"
            )
        held_out = set(random.Random(self.seed).sample(prompts, count))
        is_wanted = self.split == "validation"
        return [row for row, key in zip(rows, keys, strict=True) if (key in held_out) == is_wanted]
