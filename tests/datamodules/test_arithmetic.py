"""Additions as prompts: two splits that share nothing and lack nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drpo_lightning.datamodules import ArithmeticPrompts


def load(split, **settings):
    return ArithmeticPrompts(split, **settings).load()


@given(st.integers(1, 12), st.data(), st.integers(0, 3))
def test_the_splits_are_disjoint_and_complete(max_operand, data, seed):
    problems = (max_operand + 1) ** 2
    num_validation = data.draw(st.integers(1, problems - 1))
    settings = {"max_operand": max_operand, "num_validation": num_validation, "seed": seed}
    train, validation = ({row["prompt"] for row in load(split, **settings)} for split in ("train", "validation"))
    numbers = range(max_operand + 1)
    assert not train & validation
    assert train | validation == {f"{a}+{b}=" for a in numbers for b in numbers}
    assert (len(train), len(validation)) == (problems - num_validation, num_validation)
    assert len(load("train", **settings)) == len(train)


def test_every_answer_is_the_sum():
    for row in load("train") + load("validation"):
        a, b = row["prompt"].removesuffix("=").split("+")
        assert row["answer"] == str(int(a) + int(b))


def test_the_order_is_fixed_by_the_seed():
    assert load("train", seed=1) == load("train", seed=1)
    assert load("validation", seed=1) != load("validation", seed=2)


def test_the_order_is_not_that_of_the_numbers():
    sums = [int(row["answer"]) for row in load("train")]
    assert sums != sorted(sums)
    assert max(sums[:200]) > 150
    assert min(sums[:200]) < 50


def test_the_template_takes_the_operands():
    rows = load("train", max_operand=1, num_validation=1, template="{b} and {a}, {a} first: {x}")
    assert {row["prompt"] for row in rows} <= {f"{b} and {a}, {a} first: {{x}}" for a in (0, 1) for b in (0, 1)}


@pytest.mark.parametrize("max_operand", [-1, 0])
def test_there_must_be_numbers_to_add(max_operand):
    with pytest.raises(ValueError, match=f"`max_operand` must be positive, got {max_operand}"):
        ArithmeticPrompts(max_operand=max_operand, num_validation=1)


@pytest.mark.parametrize("num_validation", [-1, 0, 100, 101])
def test_both_splits_must_hold_something(num_validation):
    with pytest.raises(ValueError, match=f"`num_validation` must be between 1 and 99, got {num_validation}"):
        ArithmeticPrompts(max_operand=9, num_validation=num_validation)
