"""The table of completions: nothing in a completion is markup."""

import html
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from drpo_lightning.batch import Completion, Rollout
from drpo_lightning.callbacks import CompletionLogger
from drpo_lightning.callbacks.completion_logger import completion_table


def rollout_of(*texts, prompt="p"):
    return Rollout(
        prompts=[prompt] * len(texts),
        prompt_ids=[[1]] * len(texts),
        completions=[Completion([3, 4], [-1.0, -1.0], "stop")] * len(texts),
        texts=list(texts),
        columns={},
        group_size=1,
        rewards=torch.arange(len(texts)) / 2,
    )


def shown(cell):
    """A cell as a reader sees it; any markup in it other than a line break is a fault."""
    assert not re.search("<(?!br>)", cell)
    return html.unescape(cell.replace("<br>", "\n"))


def cells(table):
    """The cells of every row of a Markdown table, by TensorBoard's own converter."""
    rows = re.findall("<tr>(.*?)</tr>", markdown_to_safe_html(table), re.DOTALL)
    return [[shown(cell) for cell in re.findall("<t[dh]>(.*?)</t[dh]>", row, re.DOTALL)] for row in rows]


def test_a_table_worked_by_hand(make_rollout):
    parts = {"first": torch.tensor([1.0, 0.0, 0.5, float("nan")]), "second": torch.tensor([1234.5678] * 4)}
    assert completion_table(make_rollout(reward_parts=parts), 4, 100).splitlines() == [
        "| prompt | completion | finish | tokens | first | second | reward |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| a | w | stop | 1 | 1 | 1.23e+03 | 1 |",
        "| a | x | length | 2 | 0 | 1.23e+03 | 0 |",
        "| b | y | stop | 3 | 0.5 | 1.23e+03 | 0.5 |",
        "| b | z | stop | 6 | nan | 1.23e+03 | 0.5 |",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "a|b",
        "a\nb\n\nc",
        "<script>alert(1)</script>",
        "<b>&amp;<br>",
        "`code` ``code``",
        "*a* **b** _c_ __d__",
        "[a](http://b) ![c](d) <http://e>",
        r"\boxed{1} \| \*",
        "# no heading",
        "--- | ---",
        "&#124; &lt;",
        "\n```\ncode\n```",
    ],
)
def test_a_completion_reads_as_it_was_written(text):
    table = completion_table(rollout_of(text, "next", prompt=text), 2, 1000)
    assert cells(table)[1:] == [[text, text, "stop", "2", "0"], [text, "next", "stop", "2", "0.5"]]


@given(st.text(alphabet="ab|<>&*_`[]\\\n#-!()~:\"' ", max_size=30))
def test_no_text_breaks_the_table(text):
    table = completion_table(rollout_of(text, "next"), 2, 1000)
    assert not re.search("<(?!br>)|[`*_]", table)
    rows = cells(table)
    assert [len(row) for row in rows] == [5, 5, 5]
    assert rows[1][1].split() == text.split()
    assert rows[2] == ["p", "next", "stop", "2", "0.5"]


@pytest.mark.parametrize("text", ["a\rb", "a\r\nb"])
def test_a_carriage_return_does_not_break_the_table(text):
    assert [len(row) for row in cells(completion_table(rollout_of(text, "next"), 2, 1000))] == [5, 5, 5]


def test_a_long_text_is_cut_in_the_middle():
    text = "a" * 60 + "b" * 60
    table = completion_table(rollout_of(text, "x" * 100), 2, 100)
    assert f"| {'a' * 50} […] {'b' * 50} |".replace("[", "&#91;").replace("]", "&#93;") in table
    assert f"| {'x' * 100} |" in table


@pytest.mark.parametrize("max_characters", [0, 1])
def test_a_text_is_not_cut_to_nothing(max_characters):
    with pytest.raises(ValueError, match="`max_characters` must be at least 2"):
        CompletionLogger(max_characters=max_characters)


def test_an_empty_completion_keeps_its_cell():
    assert [len(row) for row in cells(completion_table(rollout_of("", "next"), 2, 1000))] == [5, 5, 5]


def test_only_the_first_rows_are_shown(make_rollout):
    assert len(completion_table(make_rollout(), 2, 100).splitlines()) == 2 + 2
    assert len(completion_table(make_rollout(), 99, 100).splitlines()) == 2 + 4


def test_a_run_writes_whole_groups_of_every_nth_rollout(make_run, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run", default_hp_metric=False)
    run = make_run(CompletionLogger(num_groups=2, every_n_rollouts=2), trainer={"logger": logger, "max_epochs": 5})
    run.fit()
    events = EventAccumulator(logger.log_dir, size_guidance={"tensors": 0}).Reload()
    tables = events.Tensors("completions/text_summary")
    assert [event.step for event in tables] == [0, 4, 8]
    for event in tables:
        text = event.tensor_proto.string_val[0].decode()
        rows = text.splitlines()[2:]
        assert len(rows) == 2 * 4
        assert len({row.split(" | ")[0] for row in rows[:4]}) == 1


def test_without_tensorboard_nothing_is_written(make_run, make_memory):
    make_run(CompletionLogger(), trainer={"logger": make_memory()}).fit()


@pytest.mark.parametrize("name", ["num_groups", "every_n_rollouts"])
def test_counts_are_positive(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        CompletionLogger(**{name: 0})
