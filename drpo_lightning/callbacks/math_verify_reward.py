"""Answers in mathematics."""

from collections.abc import Sequence
from typing import Any

from drpo_lightning.callbacks.fallible_reward import OnFailure, score_of_failures
from drpo_lightning.callbacks.isolated_reward import IsolatedReward
from drpo_lightning.errors import SettingError
from drpo_lightning.rewards import RewardBatch
from drpo_lightning.rewards.answers import last_boxed
from drpo_lightning.rewards.base import RewardOutcome


class MathVerifyReward(IsolatedReward):
    r"""1 if a completion's answer is the data set's answer as mathematics, by math-verify, else 0.

    `\\boxed{0.5}` answers `\\frac{1}{2}`, `\\boxed{(x+1)^2}` answers `x^2 + 2x + 1`. What it takes for equal:
    https://github.com/huggingface/Math-Verify. It runs in worker processes, because comparing two expressions may take
    any time and memory; one that is not decided within `timeout_seconds` is a timeout, which is counted. It needs the
    extra `math`.

    ```yaml
    - class_path: drpo_lightning.callbacks.MathVerifyReward
      init_args: {column: answer, num_workers: 4}
    ```

    Args:
        column: column of the data set that holds the answer: LaTeX with or without `$` or `\\boxed`, or a solution that
            ends with `#### 42`.
        boxed: the answer is what stands in the completion's last `\\boxed{...}`, and a completion without one gets 0;
            otherwise it is what math-verify takes for the answer, also a number in the text.
        weight: factor of this reward in the sum.
        name: what it is logged as.
        timeout_seconds: for one completion.
        memory_limit_gib: see `IsolatedReward`.
        on_failure: what becomes of a completion that takes too long, see `FallibleReward`.
        failure_score: with `on_failure: score`; 0 by default.
        settings: see `IsolatedReward`.

    Raises:
        ValueError: if a setting is out of range.
        SettingError: if math-verify is not installed.
    """

    def __init__(
        self,
        column: str = "answer",
        boxed: bool = True,
        weight: float = 1.0,
        name: str = "math",
        timeout_seconds: float = 5.0,
        memory_limit_gib: float | None = 2.0,
        on_failure: OnFailure = "score",
        failure_score: float | None = None,
        **settings: Any,  # noqa: ANN401
    ) -> None:
        try:
            from drpo_lightning.rewards.math_answer import MathAnswer, expected_answer
        except ImportError as error:
            raise SettingError(
                f"`MathVerifyReward` needs math-verify: pip install 'drpo-lightning[math]' ({error})"
            ) from error
        super().__init__(
            MathAnswer(column, boxed, name, weight),
            timeout_seconds=timeout_seconds,
            memory_limit_gib=memory_limit_gib,
            on_failure=on_failure,
            failure_score=score_of_failures(on_failure, failure_score),
            **settings,
        )
        self.boxed = boxed
        self._column = column
        self._expected_answer = expected_answer

    def outcomes(self, batch: RewardBatch) -> Sequence[RewardOutcome]:
        """Compares the answers.

        Raises:
            ValueError: if an answer of the data set cannot be read, whatever `on_failure` says.
        """
        for answer in dict.fromkeys(map(str, batch.column(self._column))):
            self._expected_answer(answer)
        return super().outcomes(batch)

    def answers(self, batch: RewardBatch) -> Sequence[str | None] | None:
        """The last box of each completion, as it is written."""
        return [last_boxed(completion) for completion in batch.completions] if self.boxed else None
