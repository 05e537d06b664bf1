"""Hostile data files: a file gives exactly the rows that it holds, or a `SettingError` that names file and place."""

import codecs
import csv
import gzip
import io
import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from drpo_lightning.datamodules import FilePrompts
from drpo_lightning.errors import SettingError

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
PROMPTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
ROWS = st.lists(st.fixed_dictionaries({"prompt": PROMPTS, "value": VALUES}), min_size=1, max_size=5)
LINE_ENDS = st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\r\n"])
ONE = [{"prompt": "1+1=", "answer": "2"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Hypothesis runs a test many times in one folder."""
    return tmp_path_factory.mktemp("data")


def write(path, data):
    path.write_bytes(data)
    return path


def load(path):
    return FilePrompts(str(path)).load()


def jsonl(rows, end="\n", **settings):
    return "".join(json.dumps(row, **settings) + end for row in rows).encode()


def parquet_bytes(rows, **settings):
    file = io.BytesIO()
    parquet.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), file, **settings)
    return file.getvalue()


def is_all_or_nothing(path, rows):
    """Whether a file gives all rows, or an error that names it."""
    try:
        return load(path) == rows
    except SettingError as error:
        return path.name in str(error)


# ---------------------------------------------------------------- what is loaded


@given(ROWS, LINE_ENDS, st.booleans(), st.booleans(), st.booleans())
def test_jsonl_is_read_as_it_was_written(folder, rows, end, has_mark, is_compressed, ensure_ascii):
    data = codecs.BOM_UTF8 * has_mark + jsonl(rows, end, ensure_ascii=ensure_ascii)
    path = folder / ("data.jsonl.gz" if is_compressed else "data.jsonl")
    assert load(write(path, gzip.compress(data) if is_compressed else data)) == rows


@given(st.lists(st.fixed_dictionaries({"prompt": PROMPTS, "a": TEXT, "b c": TEXT}), min_size=1, max_size=5))
def test_csv_is_read_as_it_was_written(folder, rows):
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    expected = [{name: cell or None for name, cell in row.items()} for row in rows]
    assert load(write(folder / "data.csv", codecs.BOM_UTF8 + file.getvalue().encode())) == expected


@given(
    st.lists(st.fixed_dictionaries({"prompt": PROMPTS, "n": st.integers(-9, 9) | st.none()}), min_size=1, max_size=5)
)
def test_parquet_is_read_as_it_was_written(folder, rows):
    assert load(write(folder / "data.parquet", parquet_bytes(rows))) == rows


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_megabytes_in_a_row_and_equal_rows_are_kept(tmp_path, kind):
    rows = [{"prompt": "1+" * 2**21, "answer": "2"}, *ONE, *ONE, *ONE]
    lines = "prompt,answer\n" + "".join(f"{row['prompt']},{row['answer']}\n" for row in rows)
    data = {"jsonl": jsonl(rows), "csv": lines.encode(), "parquet": parquet_bytes(rows)}[kind]
    assert load(write(tmp_path / f"data.{kind}", data)) == rows


def test_nested_columns_are_handed_on(tmp_path):
    rows = [{"prompt": "1+1=", "tests": [{"input": [1, 1], "output": {"sum": 2}}]}]
    for name, data in (("data.jsonl", jsonl(rows)), ("data.parquet", parquet_bytes(rows))):
        assert load(write(tmp_path / name, data)) == rows


def test_a_folder_s_name_adds_no_column(tmp_path):
    (tmp_path / "split=train").mkdir()
    assert load(write(tmp_path / "split=train" / "data.parquet", parquet_bytes(ONE))) == ONE


def test_line_ends_inside_a_csv_cell_stay(tmp_path):
    path = write(tmp_path / "data.CSV", b'prompt,answer\r\n"1\r\n+\n1\r=\x0b\xe2\x80\xa8",2\r\n')
    assert load(path) == [{"prompt": "1\r\n+\n1\r=\x0b\u2028", "answer": "2"}]


# ---------------------------------------------------------------- what is refused

REFUSED = {
    "utf-16": ("data.jsonl", jsonl(ONE).decode().encode("utf-16"), "line 1: not UTF-8"),
    "utf-16 without mark": ("data.jsonl", jsonl(ONE).decode().encode("utf-16-le"), "line 1: not a JSON object"),
    "latin-1": ("data.jsonl", jsonl(ONE) + '{"prompt": "caf\u00e9"}'.encode("latin-1"), "line 2: not UTF-8"),
    "latin-1 csv": ("data.csv", "prompt\ncaf\u00e9\n".encode("latin-1"), "line 2: not UTF-8"),
    "bytes": ("data.jsonl", jsonl(ONE * 2) + b"\xff\xfe\x00\x80", "line 3: not UTF-8"),
    "surrogate": ("data.jsonl", jsonl(ONE) + rb'{"prompt": "\ud800"}', "line 2: .* surrogates not allowed"),
    "surrogate elsewhere": ("data.jsonl", rb'{"prompt": "a", "x": [{"\udfff": 1}]}', "line 1: .* surrogates"),
    "nul": ("data.jsonl", jsonl(ONE) + b'{"prompt": "a\0b"}', "line 2: .* control character"),
    "half a line": ("data.jsonl", jsonl(ONE * 2)[:-3], "line 2: not a JSON object"),
    "two in a line": ("data.jsonl", jsonl(ONE * 2, end=" "), "line 1: not a JSON object"),
    "one over lines": ("data.json", json.dumps(ONE[0], indent=1).encode(), "line 1: not a JSON object"),
    "a list": ("data.json", json.dumps(ONE).encode(), "line 1: a row must be an object with columns, got list"),
    "a number": ("data.jsonl", jsonl([*ONE, 3]), "line 2: a row must be an object with columns, got int"),
    "null": ("data.jsonl", jsonl([None]), "line 1: a row must be an object with columns, got NoneType"),
    "a name twice": ("data.jsonl", b'{"prompt": "a", "prompt": "b"}', "line 1: .* 'prompt' comes twice"),
    "a name twice inside": ("data.jsonl", b'{"prompt": "a", "x": {"y": 1, "y": 2}}', "line 1: .* 'y' comes twice"),
    "deep": ("data.jsonl", b'{"prompt": "a", "x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "line 1: .* recursion"),
    "long number": ("data.jsonl", b'{"prompt": "a", "x": ' + b"9" * 5000 + b"}", "line 1: .* Exceeds the limit"),
    "empty": ("data.jsonl", b"", "is empty"),
    "blank": ("data.jsonl", b"\r\n \t\n", "is empty"),
    "only a mark": ("data.jsonl", codecs.BOM_UTF8, "is empty"),
    "empty gzip": ("data.jsonl.gz", gzip.compress(b""), "is empty"),
    "no gzip": ("data.jsonl.gz", jsonl(ONE), "not a whole gzip file"),
    "half a gzip": ("data.jsonl.gz", gzip.compress(jsonl(ONE))[:-9], "not a whole gzip file"),
    "broken gzip": ("data.csv.gz", gzip.compress(b"prompt\na\n")[:-8] + bytes(8), "not a whole gzip file"),
    "empty csv": ("data.csv", b"", "is empty"),
    "header alone": ("data.csv", b"prompt,answer\n", "is empty"),
    "short csv row": ("data.csv", b"prompt,answer\na,1\nb\n", "line 3: .* 1 cells, but 2 columns"),
    "long csv row": ("data.csv", b"prompt,answer\na,1,2\n", "line 2: .* 3 cells, but 2 columns"),
    "csv name twice": ("data.csv", b"prompt,a,a\nx,1,2\n", "line 1: .* 'a' comes twice"),
    "open quote": ("data.csv", b'prompt,answer\n"a,1\n', "line 2: .* unexpected end"),
    "stray quote": ("data.csv", b'prompt,answer\n"a"b,1\n', "line 2: not a row of a CSV file"),
    "wrong columns": ("data.csv", b"question\na\n", r"line 2: no column 'prompt'; it has \['question'\]"),
    "empty parquet": ("data.parquet", b"", "not a Parquet file"),
    "no parquet": ("data.parquet", jsonl(ONE), "not a Parquet file"),
    "no rows": ("data.parquet", parquet_bytes(pa.table({"prompt": pa.array([], pa.string())})), "is empty"),
    "parquet name twice": (
        "data.parquet",
        parquet_bytes(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["prompt", "prompt"])),
        "'prompt' comes twice",
    ),
    "parquet not utf-8": (
        "data.parquet",
        parquet_bytes(pa.table({"prompt": pa.array([b"\xff"]).view(pa.string())})),
        "not a Parquet file",
    ),
    "parquet of bytes": ("data.parquet", parquet_bytes([{"prompt": b"a"}]), "row 0: 'prompt' must be a text"),
    "another kind": ("data.txt", b"1+1=", r"must end in \.jsonl, \.json, \.csv"),
    "no ending": ("data", jsonl(ONE), "must end in"),
    "compressed parquet": ("data.parquet.gz", gzip.compress(parquet_bytes(ONE)), "must end in"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_not_as_it_should_be_is_refused(tmp_path, case):
    name, data, message = REFUSED[case]
    with pytest.raises(SettingError, match=f"(?s){name}.*{message}"):
        load(write(tmp_path / name, data))


@given(st.data())
def test_a_truncated_file_gives_whole_rows_or_an_error(folder, data):
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(4)]
    whole = {
        "data.jsonl": jsonl(rows),
        "data.jsonl.gz": gzip.compress(jsonl(rows)),
        "data.parquet": parquet_bytes(rows),
    }
    name = data.draw(st.sampled_from(sorted(whole)))
    length = data.draw(st.integers(0, len(whole[name]) - 1))
    path = write(folder / name, whole[name][:length])
    line = len(whole["data.jsonl"]) // 4
    assert is_all_or_nothing(path, rows[: (length + 1) // line] if name == "data.jsonl" else rows)


@given(st.sampled_from(["data.jsonl", "data.json.gz", "data.csv", "data.parquet"]), st.binary(max_size=200))
def test_any_bytes_give_rows_or_an_error_that_names_the_file(folder, name, data):
    try:
        rows = load(write(folder / name, data))
    except SettingError as error:
        assert name in str(error)  # noqa: PT017 - one of two outcomes
    else:
        assert all(row["prompt"] for row in rows)


@given(st.text(max_size=60) | st.lists(VALUES, max_size=4).map(lambda values: "\n".join(map(json.dumps, values))))
def test_any_text_gives_as_many_rows_as_lines_or_an_error(folder, text):
    data = text.encode(errors="surrogatepass")
    lines = [line for line in data.split(b"\n") if line.strip()]
    path = write(folder / "data.jsonl", data)
    try:
        assert len(load(path)) == len(lines)
    except SettingError as error:
        assert "data.jsonl" in str(error)  # noqa: PT017 - one of two outcomes


# ---------------------------------------------------------------- what is no file


@contextmanager
def another_user():
    """Root may read everything, so another user does."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv.gz", "data.parquet"])
@pytest.mark.parametrize(("of_folder", "of_file"), [(0o755, 0o000), (0o000, 0o644)])
def test_a_file_without_permission_is_named(name, of_folder, of_file):
    with tempfile.TemporaryDirectory() as outer:
        Path(outer).chmod(0o755)
        inner = Path(outer) / "inner"
        inner.mkdir()
        path = write(inner / name, parquet_bytes(ONE))
        path.chmod(of_file)
        inner.chmod(of_folder)
        with another_user(), pytest.raises(SettingError, match=f"{name}' cannot be read: Permission denied"):
            load(path)
        inner.chmod(0o755)


def test_a_folder_is_no_file(tmp_path):
    for name in ("x.jsonl", "x.parquet"):
        (tmp_path / name).mkdir()
        with pytest.raises(SettingError, match=f"{name}' is a folder, not a file; `HubPrompts` loads folders"):
            load(tmp_path / name)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(SettingError, match=r"x\.jsonl' does not exist"):
        load(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    "path", ["none.jsonl", "no/such/folder/x.csv", "~nobody_at_all/x.jsonl", "a\0b.jsonl", "", "~"]
)
def test_a_file_that_is_not_there_is_named(path):
    with pytest.raises(SettingError, match=r"does not exist|is a folder"):
        FilePrompts(path).load()


def test_a_name_that_is_too_long_is_an_error_of_its_own():
    with pytest.raises(SettingError, match="cannot be read: File name too long"):
        FilePrompts("x" * 5000 + ".jsonl").load()
