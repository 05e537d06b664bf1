"""Prompts from files and local data sets, and errors that name the file and the line."""

import json
import re

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from drpo_lightning.datamodules import FilePrompts, HubPrompts
from drpo_lightning.errors import SettingError

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


def test_a_csv_file_gives_its_rows_as_texts(write_jsonl):
    assert load(write_jsonl("prompt,answer", "1+1=,2", '"2+2=",4', name="data.csv")) == ROWS


def test_an_empty_cell_is_no_answer(write_jsonl):
    path = write_jsonl("prompt,answer", "1+1=,2", "2+2=,", name="data.csv")
    assert load(path)[1] == {"prompt": "2+2=", "answer": None}
    with pytest.raises(ValueError, match=r"line 3: column 'answer' is empty"):
        load(path, columns={"answer": "answer"})


def test_a_malformed_line_names_file_and_line(write_jsonl):
    path = write_jsonl(ROWS[0], "", '{"prompt": "1+1="')
    with pytest.raises(ValueError, match=r"data\.jsonl, line 3: not a JSON object"):
        load(path)


@pytest.mark.parametrize(("row", "kind"), [("[1, 2]", "list"), ('"text"', "str"), ("3", "int"), ("null", "NoneType")])
def test_a_line_that_is_no_object_names_file_and_line(write_jsonl, row, kind):
    path = write_jsonl(ROWS[0], row)
    with pytest.raises(ValueError, match=rf"data\.jsonl, line 2: a row must be an object with columns, got {kind}"):
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
        with pytest.raises(ValueError, match=f"{place}: column 'solution' is empty; it has"):
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
    with pytest.raises(ValueError, match=rf"{folder} \(train\), row 2: column 'answer' is empty"):
        HubPrompts(str(folder), columns={"answer": "answer"}).load()


def test_a_folder_of_save_to_disk_gives_its_splits(tmp_path):
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "whole")
    datasets.DatasetDict({"train": whole, "test": whole.select([1])}).save_to_disk(tmp_path / "splits")
    assert HubPrompts(str(tmp_path / "whole")).load() == ROWS
    assert HubPrompts(str(tmp_path / "splits")).load() == ROWS
    assert HubPrompts(str(tmp_path / "splits"), split="test").load() == ROWS[1:]


@pytest.mark.parametrize("split", ["validation", "train[:1]"])
def test_a_folder_of_save_to_disk_has_no_other_splits(tmp_path, split):
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "splits")
    with pytest.raises(SettingError, match=r"has the splits \['train'\], got `split` '" + re.escape(split)):
        HubPrompts(str(tmp_path / "splits"), split=split).load()


@pytest.mark.parametrize(
    ("rows", "split"),
    [(['{"prompt": "1+1="}', '{"prompt": '], "train"), (['{"prompt": "1+1="}'], "test"), ([], "train")],
)
def test_a_folder_that_cannot_be_loaded_is_named(write_folder, rows, split):
    folder = write_folder(train=ROWS)
    (folder / "train.jsonl").write_text("\n".join(rows))
    with pytest.raises(SettingError, match=f"the data set '{folder}' .* cannot be loaded"):
        HubPrompts(str(folder), split=split).load()


def test_a_data_set_that_is_not_there_is_named():
    with pytest.raises(SettingError, match=r"the data set 'nobody/nothing' .* cannot be loaded"):
        HubPrompts("nobody/nothing").load()
