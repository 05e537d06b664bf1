"""Rewards that are plugged in as callbacks."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback

from drpo_lightning.rewards import Reward, RewardBatch, exact_match, numeric_answer
from drpo_lightning.rewards.answers import boxed_number, expected_number, last_number


class RewardCallback(Callback, Reward):
    """A reward with Lightning's hooks: what a user subclasses and lists under `trainer.callbacks`.

    ```python
    class Brevity(RewardCallback):
        def score(self, batch):
            return [1.0 if len(text) < 20 else 0.0 for text in batch.completions]
    ```

    `score` runs once per completion, on the rank that trains it, before advantages are taken.

    Args:
        weight: factor of this reward in the sum.
        name: what it is logged as; by default the class's name in lower case, without a trailing "reward".
    """

    def __init__(self, weight: float = 1.0, name: str | None = None) -> None:
        self.weight = weight
        self.name = name or type(self).__name__.lower().removesuffix("reward") or "reward"

    @property
    def state_key(self) -> str:
        """Lets two rewards of one class, under different names, keep their states apart in a checkpoint."""
        return f"{type(self).__qualname__}:{self.name}"


class FunctionReward(RewardCallback):
    """A plain function as a reward.

    It is called with keyword arguments, one entry per completion in each: `prompts`, `completions`,
    `completion_ids`, `finish_reasons` and every column of the data set, as functions written for TRL are; it should
    take `**kwargs` for what it has no use for. It returns one float, or None, per completion.

    Args:
        function: the function, or its import path such as `my_module.my_function`.
        weight: factor of this reward in the sum.
        name: what it is logged as; by default the function's name.

    Raises:
        ValueError: if there is no such function.
    """

    def __init__(self, function: str | Callable[..., Any], weight: float = 1.0, name: str | None = None) -> None:
        self.function = import_function(function) if isinstance(function, str) else function
        super().__init__(weight, name or getattr(self.function, "__name__", "function"))
        self.required_columns = _named_columns(self.function)

    def score(self, batch: RewardBatch) -> Sequence[float | None]:
        """Calls the function."""
        return self.function(  # type: ignore[no-any-return]
            prompts=batch.prompts,
            completions=batch.completions,
            completion_ids=batch.completion_ids,
            finish_reasons=batch.finish_reasons,
            **batch.columns,
        )


def _named_columns(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments that a function cannot do without, apart from those that it always gets."""
    return [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in ("prompts", "completions", "completion_ids", "finish_reasons")
        and parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]


def import_function(path: str) -> Callable[..., Any]:
    """Imports a function by its dotted path.

    Raises:
        ValueError: if the module or the function does not exist.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError(f"`function` must be an import path such as `my_module.my_function`, got {path!r}")
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"`function` {path!r} cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"`function` {path!r} is not callable")
    return function  # type: ignore[no-any-return]


class ExactMatchReward(RewardCallback):
    """1 if the completion is the data set's answer apart from surrounding white space, else 0.

    Args:
        column: column of the data set that holds the answer.
        weight: factor of this reward in the sum.
        name: what it is logged as.
    """

    def __init__(self, column: str = "answer", weight: float = 1.0, name: str = "exact_match") -> None:
        super().__init__(weight, name)
        self.column = column
        self.required_columns = (column,)

    def score(self, batch: RewardBatch) -> Sequence[float | None]:
        """See `drpo_lightning.rewards.exact_match`."""
        return [exact_match(*pair) for pair in zip(batch.completions, batch.column(self.column), strict=True)]

    def answers(self, batch: RewardBatch) -> Sequence[str | None]:
        """The whole completion."""
        return [completion.strip() for completion in batch.completions]


class NumericAnswerReward(RewardCallback):
    r"""1 if the last number of the completion is the data set's answer, else 0.

    Args:
        column: column of the data set that holds the answer: a number, after `####` or in `\\boxed{...}` if it is in a
            longer text. Any other answer ends the run.
        boxed: looks for the number only in the completion's last `\\boxed{...}`.
        weight: factor of this reward in the sum.
        name: what it is logged as.
    """

    def __init__(
        self, column: str = "answer", boxed: bool = False, weight: float = 1.0, name: str = "numeric_answer"
    ) -> None:
        super().__init__(weight, name)
        self.column = column
        self.required_columns = (column,)
        self.boxed = boxed

    def score(self, batch: RewardBatch) -> Sequence[float | None]:
        """See `drpo_lightning.rewards.numeric_answer`."""
        pairs = zip(batch.completions, batch.column(self.column), strict=True)
        return [numeric_answer(completion, answer, boxed=self.boxed) for completion, answer in pairs]

    def check_row(self, row: Mapping[str, Any]) -> None:
        """The answer must be one number."""
        expected_number(str(row[self.column]))

    def answers(self, batch: RewardBatch) -> Sequence[str | None]:
        """The number that is compared, as a fraction in lowest terms."""
        find = boxed_number if self.boxed else last_number
        numbers = map(find, batch.completions)
        return [None if number is None else str(number) for number in numbers]
