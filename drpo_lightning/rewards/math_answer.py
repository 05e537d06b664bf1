"""Answers compared as mathematics, by math-verify: 1/2 is 0.5, and (x+1)^2 is x^2 + 2x + 1.

Importing this module takes the extra `math`.
"""

import logging
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from drpo_lightning.rewards.answers import last_boxed, stated_answer
from drpo_lightning.rewards.base import Reward, RewardBatch

LATEX = LatexExtractionConfig(boxed_match_priority=0)
MAX_KNOWN_ANSWERS = 10_000
"""Parsed answers that are kept."""
ENVIRONMENT = re.compile(r"(?<!\\)\$(?:[^$\\]|\\.)+\$", re.DOTALL)

# It warns that its timeouts are off. They are alarms, which exist in a main thread only, which do not interrupt the
# arithmetic of large integers, and after which an answer silently counts as wrong.
logging.getLogger("math_verify").setLevel(logging.ERROR)


class MathAnswer(Reward):
    r"""1 if a completion's answer equals the data set's, as mathematics, else 0.

    It may take any time and memory, as for `9^{9^{9^9}}`: run it in a process that can be ended.

    Args:
        column: column of the data set that holds the answer, in LaTeX.
        boxed: the answer is what stands in the completion's last `\\boxed{...}`; otherwise it is whatever math-verify
            takes for the answer.
        name: see `Reward`.
        weight: see `Reward`.
    """

    def __init__(self, column: str, boxed: bool, name: str, weight: float) -> None:
        self.column = column
        self.boxed = boxed
        self.name = name
        self.weight = weight
        self.required_columns = (column,)

    def score(self, batch: RewardBatch) -> Sequence[float | None]:
        """See the class."""
        pairs = zip(batch.completions, batch.column(self.column), strict=True)
        return [self._score(completion, str(answer)) for completion, answer in pairs]

    def _score(self, completion: str, answer: str) -> float:
        # The answer comes first: `x = 5` and intervals are not treated alike on both sides.
        return float(verify(expected_answer(answer), self._given(completion), timeout_seconds=None))

    def _given(self, completion: str) -> list[Any]:
        if not self.boxed:
            return _parsed(completion, [LATEX, ExprExtractionConfig()])
        # By itself math-verify takes boxes that follow each other for a set.
        box = last_boxed(completion)
        return [] if box is None else _parsed(rf"\boxed{{{box}}}", [LATEX])


@lru_cache(MAX_KNOWN_ANSWERS)
def expected_answer(answer: str) -> list[Any]:
    r"""The data set's answer as math-verify's expressions, parsed once: a prompt has many completions.

    Args:
        answer: LaTeX with or without `$` or `\\boxed`, or a solution that ends with `#### 42`, as in GSM8K.

    Raises:
        ValueError: if there is none.
    """
    text = stated_answer(answer)
    # Without an environment LaTeX is not recognized as such.
    parsed = _parsed(text if ENVIRONMENT.search(text) else rf"\boxed{{{text}}}", [LATEX])
    if not parsed:
        raise ValueError(f"the answer {answer!r} cannot be read as mathematics")
    return parsed


def _parsed(text: str, extraction: list[Any]) -> list[Any]:
    expressions: list[Any] = parse(text, extraction, parsing_timeout=None)
    return expressions
