"""Where prompts come from: files, the Hugging Face hub, or a generated task."""

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from drpo_lightning.errors import SettingError


class PromptSource(ABC):
    """A data set of prompts."""

    @abstractmethod
    def load(self) -> list[dict[str, Any]]:
        """The rows; `prompt` is a text, or a list of chat messages; the other columns go to the rewards.

        Raises:
            SettingError: if there are no rows or a row is malformed, naming where.
        """


class FilePrompts(PromptSource):
    """Prompts from a JSONL file, one object per line, or from a Parquet file.

    Args:
        path: the file; `.jsonl`, `.json` (with lines) or `.parquet`.
        prompt_column: column that holds the prompt, a text or a list of chat messages.
        columns: columns that rewards need, by the name that they get: `{answer: solution}` hands the column
            `solution` on as `answer`. Every row must have them. Other columns keep their names.
        suffix: text that is added to every prompt, such as how the answer is to be written.
    """

    def __init__(
        self, path: str, prompt_column: str = "prompt", columns: dict[str, str] | None = None, suffix: str = ""
    ) -> None:
        self.path = Path(path).expanduser()
        self.prompt_column = prompt_column
        self.columns = columns or {}
        self.suffix = suffix

    def load(self) -> list[dict[str, Any]]:
        """See `PromptSource.load`."""
        if not self.path.is_file():
            raise SettingError(f"the data set {str(self.path)!r} does not exist")
        if self.path.suffix == ".parquet":
            rows = _read_parquet(self.path)
        elif self.path.suffix in (".jsonl", ".json"):
            rows = _read_jsonl(self.path)
        else:
            raise SettingError(f"the data set {str(self.path)!r} must end in .jsonl, .json or .parquet")
        return _with_prompt(rows, self.prompt_column, self.columns, self.suffix, str(self.path))


class HubPrompts(PromptSource):
    """Prompts from a data set on the Hugging Face hub, or from a local folder of one.

    Args:
        name: name on the hub, `owner/name`, or a folder.
        split: its split, with slices as `datasets` writes them: `train[:1000]`.
        config: its configuration, if it has several.
        prompt_column: column that holds the prompt, a text or a list of chat messages.
        columns: columns that rewards need, by the name that they get: `{answer: solution}` hands the column
            `solution` on as `answer`. Every row must have them. Other columns keep their names.
        suffix: text that is added to every prompt, such as how the answer is to be written.
    """

    def __init__(
        self,
        name: str,
        split: str = "train",
        config: str | None = None,
        prompt_column: str = "prompt",
        columns: dict[str, str] | None = None,
        suffix: str = "",
    ) -> None:
        self.name = name
        self.split = split
        self.config = config
        self.prompt_column = prompt_column
        self.columns = columns or {}
        self.suffix = suffix

    def load(self) -> list[dict[str, Any]]:
        """See `PromptSource.load`."""
        from datasets import load_dataset

        try:
            data_set = load_dataset(self.name, self.config, split=self.split)
        except (OSError, ValueError) as error:  # what `datasets` and the hub's client raise
            raise SettingError(
                f"the data set {self.name!r} (config {self.config!r}, split {self.split!r}) cannot be loaded: {error}. "
                "Check its name, or download it and give its folder as `name`"
            ) from error
        rows = [(f"row {i}", row) for i, row in enumerate(data_set)]
        return _with_prompt(rows, self.prompt_column, self.columns, self.suffix, f"{self.name} ({self.split})")


def _read_jsonl(path: Path) -> list[tuple[str, Any]]:
    """Rows of a JSONL file, each with its place; empty lines are passed over."""
    rows = []
    with path.open(encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    rows.append((f"line {number}", json.loads(line)))
        except json.JSONDecodeError as error:
            raise SettingError(f"{path}, line {number}: not a JSON object: {error}") from error
        except UnicodeDecodeError as error:
            raise SettingError(f"{path}: not UTF-8: {error}") from error
    return rows


def _read_parquet(path: Path) -> list[tuple[str, Any]]:
    """Rows of a Parquet file, each with its place."""
    from pyarrow import ArrowInvalid, parquet

    try:
        table = parquet.read_table(path)
    except ArrowInvalid as error:
        raise SettingError(f"{path}: not a Parquet file: {error}") from error
    return [(f"row {number}", row) for number, row in enumerate(table.to_pylist())]


def _with_prompt(
    rows: list[tuple[str, Any]], prompt_column: str, columns: dict[str, str], suffix: str, origin: str
) -> list[dict[str, Any]]:
    """Gives the columns their names and checks every row."""
    if not rows:
        raise SettingError(f"the data set {origin} is empty")
    result = []
    for place, row in rows:
        if not isinstance(row, dict):
            raise SettingError(f"{origin}, {place}: a row must be an object with columns, got {type(row).__name__}")
        for column in (prompt_column, *columns.values()):
            if row.get(column) is None:
                raise SettingError(f"{origin}, {place}: no column {column!r}; it has {sorted(row)}")
        prompt = row[prompt_column]
        if not (isinstance(prompt, str) and prompt) and not (isinstance(prompt, list) and prompt):
            raise SettingError(
                f"{origin}, {place}: {prompt_column!r} must be a text or a list of chat messages, got {prompt!r}"
            )
        if isinstance(prompt, list) and not all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in prompt
        ):
            raise SettingError(f"{origin}, {place}: a chat message must have a `role` and a `content`, got {prompt!r}")
        renamed = {name: row[column] for name, column in columns.items()}
        result.append({**row, **renamed, "prompt": _with_suffix(prompt, suffix)})
    return result


def _with_suffix(prompt: str | list[dict[str, str]], suffix: str) -> str | list[dict[str, str]]:
    """Adds a text to a prompt, or to the last message of a chat."""
    if not suffix:
        return prompt
    if isinstance(prompt, str):
        return prompt + suffix
    return [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + suffix}]
