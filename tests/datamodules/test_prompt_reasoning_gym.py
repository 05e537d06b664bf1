"""Generated tasks of reasoning-gym as prompts."""

import sys
from decimal import getcontext

import pytest

from drpo_lightning.datamodules import MixedPrompts, ReasoningGymPrompts, SplitPrompts
from drpo_lightning.errors import SettingError

pytest.importorskip("reasoning_gym")
SUM = {"min_terms": 2, "max_terms": 2, "max_digits": 2}


def load(task="chain_sum", **settings):
    return ReasoningGymPrompts(task, **({"size": 5} | settings)).load()


def test_a_row_has_question_answer_and_what_the_verifier_needs():
    rows = load(config=SUM, suffix=" Only the number.")
    assert len(rows) == 5
    for row in rows:
        entry = row["problem"]["entry"]
        assert row["prompt"] == entry["question"] + " Only the number."
        assert row["answer"] == entry["answer"] == str(eval(entry["metadata"]["expression"]))
        assert (row["category"], row["problem"]["task"], row["problem"]["config"]) == ("chain_sum", "chain_sum", SUM)
        assert entry["metadata"]["num_terms"] == 2


def test_problems_are_fixed_by_the_seed():
    assert load(seed=1) == load(seed=1) != load(seed=2)


def test_a_task_leaves_the_precision_of_decimals_as_it_is():
    before = getcontext().prec
    rows = ReasoningGymPrompts("decimal_arithmetic", size=2, config={"precision": 6}).load()
    assert len(rows) == 2
    assert getcontext().prec == before


def test_problems_are_held_out_whatever_repeats():
    source = ReasoningGymPrompts("chain_sum", size=200, config=SUM | {"max_digits": 1})
    train, validation = (
        {row["prompt"] for row in SplitPrompts(source, 20, part).load()} for part in ("train", "validation")
    )
    assert len(validation) == 20
    assert not train & validation
    assert len(train) + 20 < 200


def test_tasks_are_mixed():
    tasks = {name: ReasoningGymPrompts(name, size=2) for name in ("chain_sum", "leg_counting")}
    rows = MixedPrompts(tasks, {"chain_sum": 1, "leg_counting": 3}).load()
    assert [row["data_set"] for row in rows] == [row["category"] for row in rows]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "no_task"}, "the reasoning-gym task 'no_task' cannot be made: Dataset 'no_task' not registered"),
        ({"config": {"terms": 2}}, "'chain_sum' cannot be made: .* unexpected keyword argument 'terms'"),
        ({"config": {"min_terms": 0}}, "'chain_sum' cannot be made: min_terms must be positive"),
        ({"config": {"min_terms": "two"}}, "'chain_sum' cannot be made"),
        ({"config": {"max_terms": 2.5}}, "'chain_sum' cannot be made"),
        ({"config": {"seed": 3}}, "'chain_sum' cannot be made: .* multiple values"),
    ],
)
def test_a_task_that_cannot_be_made_is_named(settings, message):
    with pytest.raises(SettingError, match=message):
        load(**settings)


@pytest.mark.parametrize("size", [0, -1, None])
def test_a_size_below_one_is_refused(size):
    with pytest.raises(ValueError, match=f"`size` must be at least 1, got {size}"):
        ReasoningGymPrompts("chain_sum", size=size)


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(SettingError, match=r"pip install drpo-lightning\[reasoning-gym\]"):
        load()
