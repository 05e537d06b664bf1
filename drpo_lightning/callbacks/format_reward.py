"""A reward for the form of a completion."""

from collections.abc import Sequence
from typing import Literal

import regex

from drpo_lightning.callbacks.fallible_reward import FallibleReward, OnFailure, score_of_failures
from drpo_lightning.rewards import RewardBatch, RewardFailure
from drpo_lightning.rewards.base import RewardOutcome


class FormatReward(FallibleReward):
    r"""1 if a completion matches a regular expression, else 0.

    ```yaml
    - class_path: drpo_lightning.callbacks.FormatReward
      init_args: {pattern: '<think>.*</think>\\s*<answer>.*</answer>\\s*', weight: 0.1}
    ```

    A dot matches line breaks too. Syntax and engine are those of the `regex` package, whose search can be stopped: a
    pattern with nested repetitions may take exponential time on a text that almost matches. A completion that is not
    decided within `timeout_seconds` is a timeout, which is counted.

    Args:
        pattern: the regular expression.
        where: it must match the `whole` completion, from its `start` on, or `anywhere` in it.
        timeout_seconds: for one completion.
        weight: factor of this reward in the sum.
        name: what it is logged as.
        on_failure: what becomes of a timeout, see `FallibleReward`.
        failure_score: with `on_failure: score`; 0 by default.
        max_stored_failures: see `FallibleReward`.

    Raises:
        ValueError: if the pattern is no regular expression, or another setting is out of range.
    """

    def __init__(
        self,
        pattern: str,
        where: Literal["whole", "start", "anywhere"] = "whole",
        timeout_seconds: float = 1.0,
        weight: float = 1.0,
        name: str = "format",
        on_failure: OnFailure = "score",
        failure_score: float | None = None,
        max_stored_failures: int = 100,
    ) -> None:
        super().__init__(weight, name, on_failure, score_of_failures(on_failure, failure_score), max_stored_failures)
        if not 0 < timeout_seconds < float("inf"):
            raise ValueError(f"`timeout_seconds` must be positive and finite, got {timeout_seconds}")
        try:
            compiled = regex.compile(pattern, regex.DOTALL)
        except regex.error as error:
            raise ValueError(f"`pattern` {pattern!r} is no regular expression: {error}") from error
        methods = {"whole": compiled.fullmatch, "start": compiled.match, "anywhere": compiled.search}
        if where not in methods:
            raise ValueError(f"`where` must be one of {list(methods)}, got {where!r}")
        self._match = methods[where]
        self.timeout_seconds = timeout_seconds

    def outcomes(self, batch: RewardBatch) -> Sequence[RewardOutcome]:
        """Matches every completion."""
        return [self._outcome(completion) for completion in batch.completions]

    def _outcome(self, completion: str) -> RewardOutcome:
        try:
            return float(self._match(completion, timeout=self.timeout_seconds) is not None)
        except TimeoutError:
            return RewardFailure("timeout", f"could not match its pattern within {self.timeout_seconds:g} s")
