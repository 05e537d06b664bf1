"""Several data sets as one and one as two: shares, passes, and parts that have nothing in common."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drpo_lightning.datamodules import ArithmeticPrompts, MixedPrompts, PromptSource, SplitPrompts
from drpo_lightning.datamodules.prompt_stream import PromptStream
from drpo_lightning.errors import SettingError


class Listed(PromptSource):
    def __init__(self, *prompts, **columns):
        self.rows = [{"prompt": prompt} | columns for prompt in prompts]

    def load(self):
        return self.rows


def rows_of(**sizes):
    return [{"prompt": f"{name}{i}", "data_set": name} for name, size in sizes.items() for i in range(size)]


def names_of(stream, positions):
    return [stream.rows[stream.row_number(position)]["data_set"] for position in positions]


# ---------------------------------------------------------------- one after the other


def test_mixed_rows_know_their_data_set_and_keep_their_columns():
    mixed = MixedPrompts({"a": Listed("1", "2", category="x"), "b": Listed("3", answer="4", data_set="own")})
    assert mixed.load() == [
        {"prompt": "1", "category": "x", "data_set": "a"},
        {"prompt": "2", "category": "x", "data_set": "a"},
        {"prompt": "3", "answer": "4", "data_set": "b"},
    ]


def test_without_weights_every_row_comes_once_in_a_pass():
    mixed = MixedPrompts({"a": Listed(*"12345"), "b": Listed("6")})
    stream = PromptStream(mixed.load(), seed=0, weights=mixed.weights)
    assert sorted(stream.row_number(position) for position in range(6)) == list(range(6))


@given(st.dictionaries(st.sampled_from("abcd"), st.floats(0.1, 10), min_size=1), st.integers(0, 5), st.integers(0, 9))
def test_weights_are_the_shares_in_every_block(weights, block, seed):
    rows = rows_of(**dict.fromkeys(weights, 3))
    counts = Counter(names_of(PromptStream(rows, seed=seed, weights=weights), range(1000 * block, 1000 * block + 1000)))
    assert sum(counts.values()) == 1000
    for name, weight in weights.items():
        assert abs(counts[name] - 1000 * weight / sum(weights.values())) < 1


def test_each_data_set_comes_in_shuffled_passes_of_its_own():
    stream = PromptStream(rows_of(large=300, small=7), seed=3, weights={"large": 3, "small": 1})
    numbers = {"large": [], "small": []}
    for position in range(4000):
        number = stream.row_number(position)
        numbers[stream.rows[number]["data_set"]].append(number)
    for of_set, size, first in ((numbers["large"], 300, 0), (numbers["small"], 7, 300)):
        passes = [of_set[i : i + size] for i in range(0, len(of_set) - size + 1, size)]
        assert all(sorted(one) == list(range(first, first + size)) for one in passes)
        assert passes[0] != passes[1]


@given(st.lists(st.integers(0, 10**7), max_size=8), st.booleans())
def test_a_position_has_its_row_whatever_was_asked_before(positions, has_weights):
    settings = {"seed": 1, "weights": {"a": 2, "b": 1} if has_weights else None}
    asked = PromptStream(rows_of(a=5, b=3), **settings)
    for position in positions:
        assert asked.row_number(position) == PromptStream(rows_of(a=5, b=3), **settings).row_number(position)


def test_the_order_of_a_mixture_is_fixed_by_the_seed_and_random():
    def order(seed):
        return names_of(PromptStream(rows_of(a=2, b=2), seed=seed, weights={"a": 1, "b": 1}), range(200))

    assert order(0) == order(0) != order(1)
    assert 60 < sum(x != y for x, y in zip(order(0), order(0)[1:], strict=False)) < 140


def test_a_period_begins_the_mixture_again():
    stream = PromptStream(rows_of(a=9, b=9), seed=0, weights={"a": 1, "b": 1}, period=4)
    assert [stream.row_number(i) for i in range(4)] == [stream.row_number(i) for i in range(8, 12)]


def test_the_row_of_a_stream_without_weights_is_as_it_was():
    stream = PromptStream([{}] * 10, seed=7)
    assert [stream.row_number(i) for i in range(12)] == [6, 1, 2, 4, 9, 0, 3, 5, 8, 7, 0, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({},), "`data_sets` must name at least one data set"),
        (({"a": Listed("1")}, {"b": 1.0}), r"`weights` must be given for \['a'\], got \['b'\]"),
        (({"a": Listed("1")}, {}), r"`weights` must be given for \['a'\], got \[\]"),
        (({"a": Listed("1")}, {"a": 0.0}), "`weights` must be positive, got 0.0 for 'a'"),
        (({"a": Listed("1")}, {"a": float("nan")}), "`weights` must be positive, got nan"),
        (({"a": Listed("1")}, {"a": float("inf")}), "`weights` must be positive, got inf"),
        (({"a": MixedPrompts({"b": Listed("1")}, {"b": 1.0})},), "`data_sets` must have no weights of their own"),
    ],
)
def test_weights_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MixedPrompts(*arguments)


def test_a_data_set_that_could_never_come_is_refused():
    with pytest.raises(SettingError, match="the data set 'b' has a weight, but no rows"):
        PromptStream(rows_of(a=1), seed=0, weights={"a": 1, "b": 1})
    with pytest.raises(SettingError, match="the weight of 'b' is less than a thousandth"):
        PromptStream(rows_of(a=1, b=1), seed=0, weights={"a": 1e5, "b": 1})


def test_an_error_in_a_data_set_names_it(tmp_path):
    from drpo_lightning.datamodules import FilePrompts

    with pytest.raises(SettingError, match=r"`data_sets\.b`: the data set '.*none\.jsonl' does not exist"):
        MixedPrompts({"a": Listed("1"), "b": FilePrompts(str(tmp_path / "none.jsonl"))}).load()


# ---------------------------------------------------------------- one as two


@given(
    st.lists(st.sampled_from("abcdefgh") | st.just([{"role": "user", "content": "a"}]), min_size=2),
    st.integers(1, 8) | st.floats(0.05, 0.95),
    st.integers(0, 5),
)
def test_the_parts_of_a_split_have_all_rows_and_no_prompt_in_common(prompts, holdout, seed):
    source = Listed(*prompts)
    different = {json.dumps(prompt) for prompt in prompts}
    count = round(holdout * len(different)) if holdout < 1 else holdout
    if not 0 < count < len(different):
        with pytest.raises(SettingError, match="both parts must have some"):
            SplitPrompts(source, holdout, seed=seed).load()
        return
    train, validation = (SplitPrompts(source, holdout, split, seed).load() for split in ("train", "validation"))
    held_out = {json.dumps(row["prompt"]) for row in validation}
    assert len(held_out) == count
    assert not held_out & {json.dumps(row["prompt"]) for row in train}
    assert sorted(map(json.dumps, train + validation)) == sorted(map(json.dumps, source.rows))


def test_a_split_is_fixed_by_its_seed_and_keeps_the_order():
    source = ArithmeticPrompts(max_operand=9, num_validation=1)
    first, again, other = (SplitPrompts(source, 20, "validation", seed).load() for seed in (0, 0, 1))
    assert first == again != other
    assert first == [row for row in source.load() if row in first]


def test_a_split_keeps_the_weights_of_its_data_set():
    source = MixedPrompts({"a": Listed(*"1234"), "b": Listed(*"5678")}, {"a": 3, "b": 1})
    assert SplitPrompts(source, 2).weights == {"a": 3, "b": 1}
    assert not SplitPrompts(Listed("1"), 1).weights


@pytest.mark.parametrize("holdout", [0, -1, 1.5, 0.0, float("nan"), float("inf")])
def test_a_holdout_is_a_count_or_a_share(holdout):
    with pytest.raises(ValueError, match="`holdout` must be a positive whole number, or a share between 0 and 1, got"):
        SplitPrompts(Listed("1", "2"), holdout)
