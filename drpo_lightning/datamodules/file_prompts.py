"""Prompts from a file: every row that it holds, exactly, or an error that names file and place."""

import codecs
import csv
import gzip
import io
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from drpo_lightning.datamodules.prompts import PromptSource, rows_with_prompts
from drpo_lightning.errors import SettingError

Rows = list[tuple[str, Any]]
"""What was found at each place of a file."""


class FilePrompts(PromptSource):
    """Prompts from a JSONL, CSV or Parquet file.

    Text files are in UTF-8 and may be compressed with gzip. A JSONL file has one object per line; a CSV file has a line
    of column names, its cells are texts, and an empty one is null. Lines that are empty are passed over.

    Args:
        path: the file; `.jsonl`, `.json` (with lines), `.csv`, each also with `.gz`, or `.parquet`.
        prompt_column: column that holds the prompt, a text or a list of chat messages.
        columns: columns that rewards need, by the name that they get: `{answer: solution}` hands the column
            `solution` on as `answer`. Every row must have them. Other columns keep their names.
        suffix: text that is added to every prompt, such as how the answer is to be written.
    """

    def __init__(
        self, path: str, prompt_column: str = "prompt", columns: dict[str, str] | None = None, suffix: str = ""
    ) -> None:
        self.path = Path(os.path.expanduser(path))  # `Path.expanduser` raises on an unknown user
        self.prompt_column = prompt_column
        self.columns = columns or {}
        self.suffix = suffix

    def load(self) -> list[dict[str, Any]]:
        """See `PromptSource.load`."""
        try:
            read = _reader(self.path)
            rows = read(self.path)
        except OSError as error:
            raise SettingError(f"the data set {str(self.path)!r} cannot be read: {error.strerror or error}") from error
        return rows_with_prompts(
            rows,
            prompt_column=self.prompt_column,
            columns=self.columns,
            suffix=self.suffix,
            origin=str(self.path),
        )


def _reader(path: Path) -> Callable[[Path], Rows]:
    """What reads a file, by its name."""
    if path.is_dir():
        raise SettingError(f"the data set {str(path)!r} is a folder, not a file; `HubPrompts` loads folders")
    if not path.is_file():
        raise SettingError(f"the data set {str(path)!r} does not exist, or is no regular file")
    name = path.name.lower()
    readers = {".jsonl": _read_jsonl, ".json": _read_jsonl, ".csv": _read_csv}
    for ending, reader in readers.items():
        if name.removesuffix(".gz").endswith(ending):
            return reader
    if name.endswith(".parquet"):
        return _read_parquet
    raise SettingError(f"the data set {str(path)!r} must end in .jsonl, .json, .csv (also with .gz) or .parquet")


def _read_text(path: Path) -> str:
    """The whole of a UTF-8 file, without a byte order mark."""
    is_compressed = path.suffix.lower() == ".gz"
    try:
        with gzip.open(path) if is_compressed else path.open("rb") as file:
            data = file.read().removeprefix(codecs.BOM_UTF8)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SettingError(f"{path}: not a whole gzip file: {error}") from error
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SettingError(f"{path}, line {line}: not UTF-8: {error.reason}; save the file as UTF-8") from error


def _read_jsonl(path: Path) -> Rows:
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                rows.append((f"line {number}", _json_row(line)))
            except (ValueError, RecursionError) as error:
                raise SettingError(f"{path}, line {number}: not a JSON object in one line: {error}") from error
    return rows


def _json_row(line: str) -> Any:  # noqa: ANN401
    """The value of a line.

    Raises:
        ValueError: if it is no JSON, a name comes twice in an object, or a text is not Unicode.
        RecursionError: if it is nested too deeply.
    """
    row = json.loads(line, object_pairs_hook=_object)
    if "\\u" in line:  # the only way to write half of a surrogate pair, which no tokenizer takes
        json.dumps(row, ensure_ascii=False).encode()
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_names([name for name, _ in pairs])
    return dict(pairs)


def _check_names(names: Sequence[str]) -> None:
    """Raises `ValueError` if a column would take the place of another."""
    if len(set(names)) < len(names):
        raise ValueError(f"the name {Counter(names).most_common(1)[0][0]!r} comes twice")


def _read_csv(path: Path) -> Rows:
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    largest = csv.field_size_limit(sys.maxsize)
    try:
        names = next(reader, [])
        _check_names(names)
        return [(f"line {reader.line_num}", _csv_row(names, cells)) for cells in reader if cells]
    except (csv.Error, ValueError) as error:
        raise SettingError(f"{path}, line {reader.line_num}: not a row of a CSV file: {error}") from error
    finally:
        csv.field_size_limit(largest)


def _csv_row(names: Sequence[str], cells: Sequence[str]) -> dict[str, str | None]:
    """A row by column; raises `ValueError` if it has too few or too many cells."""
    if len(cells) != len(names):
        raise ValueError(f"{len(cells)} cells, but {len(names)} columns")
    return {name: cell or None for name, cell in zip(names, cells, strict=True)}


def _read_parquet(path: Path) -> Rows:
    from pyarrow import ArrowException, parquet

    with path.open("rb") as opened:
        try:
            with parquet.ParquetFile(opened, page_checksum_verification=True) as file:
                _check_names(file.schema_arrow.names)
                table = file.read()
            return [(f"row {number}", row) for number, row in enumerate(table.to_pylist())]
        except (ArrowException, OSError, ValueError) as error:
            raise SettingError(f"{path}: not a Parquet file that can be read: {error}") from error
