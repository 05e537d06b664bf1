"""Additions as prompts: a task that a small model learns in minutes."""

import random
from typing import Any, Literal

from drpo_lightning.datamodules.prompts import PromptSource


class ArithmeticPrompts(PromptSource):
    """All additions `a+b=` of numbers up to `max_operand`, in a fixed random order, split in two.

    The column `answer` holds the sum.

    Args:
        split: `train`, or `validation` for the `num_validation` problems that training never sees.
        max_operand: largest number that is added.
        num_validation: problems of the validation split.
        template: text of the prompt, with `{a}` and `{b}`.
        seed: of the order, and so of the split.

    Raises:
        ValueError: if there are no numbers to add, or a split would be empty.
    """

    def __init__(
        self,
        split: Literal["train", "validation"] = "train",
        max_operand: int = 99,
        num_validation: int = 500,
        template: str = "{a}+{b}=",
        seed: int = 0,
    ) -> None:
        if max_operand < 1:
            raise ValueError(f"`max_operand` must be positive, got {max_operand}")
        problems = (max_operand + 1) ** 2
        if not 0 < num_validation < problems:
            raise ValueError(f"`num_validation` must be between 1 and {problems - 1}, got {num_validation}")
        self.split = split
        self.max_operand = max_operand
        self.num_validation = num_validation
        self.template = template
        self.seed = seed

    def load(self) -> list[dict[str, Any]]:
        """The problems of the split."""
        numbers = range(self.max_operand + 1)
        pairs = [(a, b) for a in numbers for b in numbers]
        random.Random(self.seed).shuffle(pairs)
        chosen = pairs[: self.num_validation] if self.split == "validation" else pairs[self.num_validation :]
        return [
            {"prompt": self.template.replace("{a}", str(a)).replace("{b}", str(b)), "answer": str(a + b)}
            for a, b in chosen
        ]
