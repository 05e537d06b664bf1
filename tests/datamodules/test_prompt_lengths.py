"""Prompts that are too long: an error that names the first, or left out and counted."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drpo_lightning.batch import Sampling
from drpo_lightning.datamodules import ArithmeticPrompts, PromptSource
from drpo_lightning.datamodules.prompt_lengths import without_overlong
from drpo_lightning.errors import SettingError

SETTINGS = {"max_prompt_tokens": None, "max_tokens": 4, "context_tokens": 10, "key": "data.prompts"}


class Listed(PromptSource):
    def __init__(self, *prompts):
        self.prompts = prompts

    def load(self):
        return [{"prompt": prompt} for prompt in self.prompts]


def rows_of(*lengths):
    return [{"prompt": "1" * length, "prompt_ids": [20] * length} for length in lengths]


@given(st.lists(st.integers(1, 12)), st.none() | st.integers(1, 12), st.integers(1, 8))
def test_what_is_kept_fits_and_nothing_else_is_dropped(lengths, max_prompt_tokens, max_tokens):
    limit = min(10 - max_tokens, max_prompt_tokens or 10)
    settings = SETTINGS | {"max_prompt_tokens": max_prompt_tokens, "max_tokens": max_tokens}
    expected = [row for row in rows_of(*lengths) if len(row["prompt_ids"]) <= limit]
    if lengths and not expected:
        with pytest.raises(SettingError, match=f"{len(lengths)} of {len(lengths)} prompts are too long"):
            without_overlong(rows_of(*lengths), policy="drop", **settings)
    else:
        assert without_overlong(rows_of(*lengths), policy="drop", **settings) == expected


def test_the_first_prompt_that_is_too_long_is_named_with_its_reason():
    with pytest.raises(SettingError, match=r"prompt 1 has 7 tokens and may be continued by 4 .*; 2 of 4 prompts"):
        without_overlong(rows_of(6, 7, 8, 1), policy="raise", **SETTINGS)
    settings = SETTINGS | {"max_prompt_tokens": 2}
    with pytest.raises(SettingError, match=r"prompt 1 has 3 tokens more than `data\.max_prompt_tokens` 2; 1 of 2"):
        without_overlong(rows_of(2, 3), policy="raise", **settings)


def test_a_run_says_how_many_prompts_it_leaves_out(make_run, make_recorder, caplog):
    recorder = make_recorder()
    run = make_run(
        recorder,
        data={
            "prompts": Listed("1+1=", "11+1=", "2+2=", "111+1="),
            "val_prompts": ArithmeticPrompts("validation", max_operand=10, num_validation=100),
            "max_prompt_tokens": 4,
            "overlong_prompts": "drop",
            "sampling": Sampling(2, 1.5),
        },
    )
    with caplog.at_level(logging.INFO):
        run.fit()
    assert set(recorder.rollouts[0].prompts) == {"1+1=", "2+2="}
    assert run.data.num_overlong_prompts == 2
    assert "`data.prompts`: 2 of 4 prompts have more than 4 tokens and are left out" in caplog.text
    assert "`data.val_prompts`: " in caplog.text


def test_a_limit_below_one_is_refused(make_run):
    with pytest.raises(ValueError, match=r"`data\.max_prompt_tokens` must be at least 1, got 0"):
        make_run(data={"max_prompt_tokens": 0})
