"""Generated tasks of `reasoning-gym`."""

from decimal import localcontext
from typing import Any

from drpo_lightning.datamodules.prompts import PromptSource
from drpo_lightning.errors import SettingError


class ReasoningGymPrompts(PromptSource):
    """Problems that a task of `reasoning-gym` generates; `ReasoningGymReward` scores them by the task's own verifier.

    The column `answer` holds a right answer, or null where the task has none to show; `category` the name of the task;
    `problem` task, settings and entry, for the verifier. Tasks are mixed by `MixedPrompts`. Other seeds may give the
    same problems: hold out those of a validation by `SplitPrompts`.

    Args:
        task: name of the task, such as `chain_sum`.
        size: how many problems.
        seed: of the problems.
        config: settings of the task, such as `{max_terms: 3}`.
        suffix: text that is added to every question, such as how the answer is to be written.

    Raises:
        ValueError: if `size` is not positive.
    """

    def __init__(
        self, task: str, size: int = 1000, seed: int = 0, config: dict[str, Any] | None = None, suffix: str = ""
    ) -> None:
        if not (isinstance(size, int) and size >= 1):  # null passes for any type in the parser
            raise ValueError(f"`size` must be at least 1, got {size}")
        self.task = task
        self.size = size
        self.seed = seed
        self.config = config or {}
        self.suffix = suffix

    def load(self) -> list[dict[str, Any]]:
        """See `PromptSource.load`."""
        try:
            from reasoning_gym import create_dataset
        except ImportError as error:
            raise SettingError(
                "`ReasoningGymPrompts` needs reasoning-gym: pip install drpo-lightning[reasoning-gym]"
            ) from error
        try:
            with localcontext():  # decimal_arithmetic changes the precision of all decimals
                entries = list(create_dataset(self.task, size=self.size, seed=self.seed, **self.config))
        except Exception as error:  # anything: a hundred generators check their settings, or run into them
            raise SettingError(f"the reasoning-gym task {self.task!r} cannot be made: {error}") from error
        return [
            {
                "prompt": entry["question"] + self.suffix,
                "answer": entry["answer"],
                "category": self.task,
                "problem": {"task": self.task, "config": self.config, "entry": entry},
            }
            for entry in entries
        ]
