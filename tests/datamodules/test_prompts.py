"""Prompts from files and local data sets, and errors that name the file and the line."""

import json

import datasets
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from drpo_lightning.datamodules import FilePrompts, HubPrompts

ROWS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}]
CHAT = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1="}]


@pytest.fixture
def write_jsonl(tmp_path):
    def write(*lines, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
        return path

    return write


@pytest.fixture
def write_parquet(tmp_path):
    def write(rows, name="data.parquet"):
        path = tmp_path / name
        parquet.write_table(pa.Table.from_pylist(rows), path)
        return path

    return write


@pytest.fixture
def write_folder(tmp_path, monkeypatch):
    """A data set as a folder of JSONL files; the cache of `datasets` is kept out of the home folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(**splits):
        folder = tmp_path / "folder"
        folder.mkdir()
        for split, rows in splits.items():
            (folder / f"{split}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return folder

    return write


def load(path, **settings):
    return FilePrompts(str(path), **settings).load()


@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_a_jsonl_file_gives_its_rows(write_jsonl, name):
    assert load(write_jsonl(*ROWS, name=name)) == ROWS


def test_a_parquet_file_gives_its_rows(write_parquet):
    assert load(write_parquet(ROWS)) == ROWS


@given(st.lists(st.fixed_dictionaries({"prompt": st.text(min_size=1), "n": st.integers() | st.none()}), min_size=1))
def test_what_was_written_is_read(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert load(path) == rows


def test_empty_lines_are_passed_over(write_jsonl):
    assert load(write_jsonl("", ROWS[0], "  ", "\t", ROWS[1], "")) == ROWS


def test_a_malformed_line_names_file_and_line(write_jsonl):
    path = write_jsonl(ROWS[0], "", '{"prompt": "1+1="')
    with pytest.raises(ValueError, match=r"data\.jsonl, line 3: not a JSON object"):
        load(path)


@pytest.mark.parametrize(("row", "kind"), [("[1, 2]", "list"), ('"text"', "str"), ("3", "int"), ("null", "NoneType")])
def test_a_line_that_is_no_object_names_file_and_line(write_jsonl, row, kind):
    path = write_jsonl(ROWS[0], row)
    with pytest.raises(ValueError, match=rf"data\.jsonl, line 2: a row must be an object with columns, got {kind}"):
        load(path)


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes('{"prompt": "caf\u00e9"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"data\.jsonl: not UTF-8"):
        load(path)


def test_a_file_that_is_not_parquet_is_named(tmp_path):
    path = tmp_path / "data.parquet"
    path.write_text(json.dumps(ROWS[0]))
    with pytest.raises(ValueError, match=r"data\.parquet: not a Parquet file"):
        load(path)


@pytest.mark.parametrize("name", ["data.csv", "data", "data.jsonl.gz"])
def test_another_kind_of_file_is_refused(write_jsonl, name):
    path = write_jsonl(*ROWS, name=name)
    with pytest.raises(ValueError, match=r"must end in \.jsonl, \.json or \.parquet"):
        load(path)


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(ValueError, match=f"the data set '{path}' does not exist"):
            load(path)


def test_an_empty_data_set_is_refused(write_jsonl, write_parquet):
    for path in (write_jsonl(), write_jsonl("", " ", name="blank.jsonl"), write_parquet([{"prompt": "x"}][:0])):
        with pytest.raises(ValueError, match=f"the data set {path} is empty"):
            load(path)


def test_a_home_folder_is_found(write_jsonl, monkeypatch):
    monkeypatch.setenv("HOME", str(write_jsonl(*ROWS).parent))
    assert load("~/data.jsonl") == ROWS


def test_a_missing_prompt_column_names_the_columns_there_are(write_jsonl):
    path = write_jsonl({"question": "1+1=", "answer": "2"})
    with pytest.raises(ValueError, match=r"line 1: no column 'prompt'; it has \['answer', 'question'\]"):
        load(path)
    assert load(path, prompt_column="question")[0]["prompt"] == "1+1="


def test_a_missing_answer_column_names_the_row(write_jsonl, write_parquet):
    rows = [{"prompt": "1+1=", "solution": "2"}, {"prompt": "2+2=", "solution": None}]
    for path, place in ((write_jsonl(*rows), "line 2"), (write_parquet(rows), "row 1")):
        with pytest.raises(ValueError, match=f"{place}: no column 'solution'; it has"):
            load(path, columns={"answer": "solution"})


def test_columns_get_the_names_that_rewards_know(write_jsonl):
    rows = load(write_jsonl({"prompt": "1+1=", "solution": "2", "level": 3}), columns={"answer": "solution"})
    assert rows == [{"prompt": "1+1=", "solution": "2", "level": 3, "answer": "2"}]


def test_a_column_may_take_the_name_of_another(write_jsonl):
    path = write_jsonl({"prompt": "id 7", "text": "1+1=", "answer": "see solution", "solution": "2"})
    rows = load(path, prompt_column="text", columns={"answer": "solution", "solution": "answer"})
    assert rows == [{"prompt": "1+1=", "text": "1+1=", "answer": "2", "solution": "see solution"}]


@pytest.mark.parametrize("prompt", ["", [], 3, {"role": "user"}, True])
def test_a_prompt_is_a_text_or_messages(write_jsonl, prompt):
    path = write_jsonl(ROWS[0], {"prompt": prompt})
    with pytest.raises(ValueError, match="line 2: 'prompt' must be a text or a list of chat messages, got"):
        load(path)


@pytest.mark.parametrize("messages", [["1+1="], [{"text": "1+1="}], [{"role": "user"}], [{"content": "1+1="}]])
def test_a_message_without_role_or_content_names_the_line(write_jsonl, messages):
    path = write_jsonl(ROWS[0], {"prompt": messages})
    with pytest.raises(ValueError, match="line 2"):
        load(path, suffix="!")


def test_messages_stay_messages(write_jsonl, write_parquet):
    for path in (write_jsonl({"prompt": CHAT}), write_parquet([{"prompt": CHAT}])):
        assert load(path) == [{"prompt": CHAT}]


def test_a_suffix_ends_the_prompt_or_the_last_message(write_jsonl):
    path = write_jsonl({"prompt": "1+1="}, {"prompt": CHAT})
    text, chat = (row["prompt"] for row in load(path, suffix=" Box it."))
    assert text == "1+1= Box it."
    assert chat == [CHAT[0], {"role": "user", "content": "1+1= Box it."}]


def test_a_local_folder_is_a_hub_data_set(write_folder):
    folder = write_folder(train=ROWS, test=ROWS[:1])
    assert HubPrompts(str(folder)).load() == ROWS
    assert HubPrompts(str(folder), split="test").load() == ROWS[:1]
    assert HubPrompts(str(folder), split="train[1:]").load() == ROWS[1:]


def test_hub_prompts_have_the_settings_of_files(write_folder):
    folder = write_folder(train=[{"question": "1+1=", "solution": "2"}])
    source = HubPrompts(str(folder), prompt_column="question", columns={"answer": "solution"}, suffix=" ")
    assert source.load() == [{"question": "1+1=", "solution": "2", "answer": "2", "prompt": "1+1= "}]


def test_hub_prompts_name_data_set_split_and_row(write_folder):
    folder = write_folder(train=[*ROWS, {"prompt": "3+3=", "answer": None}])
    with pytest.raises(ValueError, match=rf"{folder} \(train\), row 2: no column 'answer'"):
        HubPrompts(str(folder), columns={"answer": "answer"}).load()
