"""The verifiers of `reasoning-gym` as a reward."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from drpo_lightning.callbacks.rewards import RewardCallback
from drpo_lightning.errors import SettingError
from drpo_lightning.rewards import RewardBatch, RewardError

EVALUATING_TASKS = frozenset(
    {
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)
"""Tasks of reasoning-gym 0.1.25 whose verifiers run the answer as Python, by `eval` or by SymPy's parser."""


class ReasoningGymReward(RewardCallback):
    """What the verifier of a problem of `ReasoningGymPrompts` says of an answer: 1 if it is right, less if it is not.

    Many verifiers give part of the reward, such as 0.01, to an answer that is wrong but has the right form. Some raise
    on an answer that they cannot read, which ends the run, and none has a time limit: in an `IsolatedReward` such an
    answer is a failure that is counted.

    Args:
        column: column of the data set that holds the problem.
        tag: the answer is what stands in the completion's last `<tag>...</tag>`, and missing without one; null takes
            the whole completion. Surrounding white space does not count.
        allow_eval: lets verifiers run that evaluate the answer as Python code: a policy could then run any code. Only
            in a container of its own.
        weight: factor of this reward in the sum.
        name: what it is logged as.
    """

    def __init__(
        self,
        column: str = "problem",
        tag: str | None = "answer",
        allow_eval: bool = False,
        weight: float = 1.0,
        name: str = "reasoning_gym",
    ) -> None:
        super().__init__(weight, name)
        self.column = column
        self.required_columns = (column,)
        self.tag = tag
        self.allow_eval = allow_eval

    def check_row(self, row: Mapping[str, Any]) -> None:
        """The verifier must not run the answer as code, unless that is allowed."""
        if reason := self._refusal(row[self.column]["task"]):
            raise ValueError(reason)

    def _refusal(self, task: str) -> str:
        """Why a task is not scored; empty if it is."""
        if task not in EVALUATING_TASKS or self.allow_eval:
            return ""
        return (
            f"the verifier of the reasoning-gym task {task!r} runs the policy's answers as Python code: leave the "
            "task out, or set `allow_eval` of ReasoningGymReward and train in a container"
        )

    def score(self, batch: RewardBatch) -> Sequence[float | None]:
        """Asks each problem's verifier.

        Raises:
            RewardError: if a verifier would evaluate the answer, and that is not allowed.
        """
        return [
            self._score(completion, problem)
            for completion, problem in zip(batch.completions, batch.column(self.column), strict=True)
        ]

    def _score(self, completion: str, problem: dict[str, Any]) -> float:
        task = problem["task"]
        if reason := self._refusal(task):
            raise RewardError(reason)
        answer = completion.strip() if self.tag is None else tagged_text(completion, self.tag)
        verifier = _verifier(task, json.dumps(problem["config"], sort_keys=True))
        return float(verifier.score_answer(answer, problem["entry"]))


def tagged_text(text: str, tag: str) -> str | None:
    """What stands in the last `<tag>...</tag>` of a text; None if there is none."""
    _, is_open, rest = text.rpartition(f"<{tag}>")
    inside, is_closed, _ = rest.partition(f"</{tag}>")
    return inside.strip() if is_open and is_closed else None


@cache
def _verifier(task: str, config: str) -> Any:  # noqa: ANN401 - a reasoning_gym ProceduralDataset
    """The task with its settings, which some verifiers read."""
    try:
        from reasoning_gym import create_dataset
    except ImportError as error:
        raise SettingError(
            "`ReasoningGymReward` needs reasoning-gym: pip install drpo-lightning[reasoning-gym]"
        ) from error
    return create_dataset(task, **json.loads(config))
