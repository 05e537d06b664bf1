"""What a source of prompts is, and what every row of one must have."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from drpo_lightning.errors import SettingError

Prompt = str | list[dict[str, str]]
"""A text, or a list of chat messages with `role` and `content`."""


class PromptSource(ABC):
    """A data set of prompts."""

    @abstractmethod
    def load(self) -> list[dict[str, Any]]:
        """The rows; `prompt` is a text, or a list of chat messages; the other columns go to the rewards.

        Raises:
            SettingError: if there are no rows or a row is malformed, naming where.
        """

    @property
    def weights(self) -> Mapping[str, float]:
        """Shares of the data sets in the prompts of the training, by the rows' column `data_set`.

        Empty, as by default, if every row is to come equally often.
        """
        return {}


def rows_with_prompts(
    rows: Sequence[tuple[str, Any]], *, prompt_column: str, columns: Mapping[str, str], suffix: str, origin: str
) -> list[dict[str, Any]]:
    """Gives the columns their names and checks every row.

    Args:
        rows: a place, for errors, and what was found there.
        prompt_column: column that holds the prompt.
        columns: columns that rewards need, by the name that they get.
        suffix: text that is added to every prompt.
        origin: what the rows come from, for errors.

    Raises:
        SettingError: if there are no rows, or one lacks a column or has a malformed prompt.
    """
    if not rows:
        raise SettingError(f"the data set {origin} is empty")
    result = []
    for place, row in rows:
        if not isinstance(row, dict):
            raise SettingError(f"{origin}, {place}: a row must be an object with columns, got {type(row).__name__}")
        _check_columns(row, (prompt_column, *columns.values()), f"{origin}, {place}")
        _check_prompt(row[prompt_column], f"{origin}, {place}", prompt_column)
        renamed = {name: row[column] for name, column in columns.items()}
        result.append({**row, **renamed, "prompt": with_suffix(row[prompt_column], suffix)})
    return result


def _check_columns(row: Mapping[str, Any], names: Iterable[str], place: str) -> None:
    for name in names:
        if row.get(name) is None:
            what = f"column {name!r} is empty" if name in row else f"no column {name!r}"
            raise SettingError(f"{place}: {what}; it has {sorted(row)}")


def _check_prompt(prompt: Any, place: str, column: str) -> None:  # noqa: ANN401
    if not (isinstance(prompt, str | list) and prompt):
        raise SettingError(f"{place}: {column!r} must be a text or a list of chat messages, got {_shown(prompt)}")
    if isinstance(prompt, list) and not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in prompt
    ):
        raise SettingError(f"{place}: a chat message must have a `role` and a `content`, got {_shown(prompt)}")


def _shown(value: Any) -> str:  # noqa: ANN401
    """A value as it is written, if that is short."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def with_suffix(prompt: Prompt, suffix: str) -> Prompt:
    """Adds a text to a prompt, or to the last message of a chat."""
    if not suffix:
        return prompt
    if isinstance(prompt, str):
        return prompt + suffix
    return [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + suffix}]
