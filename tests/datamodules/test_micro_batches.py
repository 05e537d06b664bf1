"""Which samples an update takes: the same on any number of ranks, each exactly once."""

from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.strategies import SingleDeviceStrategy

from drpo_lightning.batch import Completion, Rollout
from drpo_lightning.datamodules.micro_batches import (
    Split,
    balanced_chunks,
    check_batch_sizes,
    equal_chunks,
    prompts_per_block,
    split_rollout,
    update_rows,
    update_sizes,
)
from drpo_lightning.datamodules.seeds import seed_of
from drpo_lightning.errors import SettingError

SPLITS = [(8, 8, 4), (8, 6, 4), (4, 3, 3), (8, 2, 4), (12, 5, 3), (4, 4, 1), (8, 3, 2), (16, 8, 32)]
"""Prompts, samples of each, updates."""


def split_over(num_ranks, num_prompts, group_size, num_updates, seed=0):
    """Samples of each update and rank, numbered through the whole rollout."""
    per_rank = num_prompts // num_ranks
    result = []
    for rank in range(num_ranks):
        first = rank * per_rank
        block = prompts_per_block(group_size, num_updates)
        seeds = [seed_of(seed, prompt) for prompt in range(first, first + per_rank, block)]
        rows = update_rows(seeds, group_size=group_size, num_updates=num_updates)
        result.append([[first * group_size + row for row in update] for update in rows])
    return [[ranks[update] for ranks in result] for update in range(num_updates)]


@pytest.mark.parametrize(("num_prompts", "group_size", "num_updates"), SPLITS)
def test_an_update_takes_the_same_samples_on_any_number_of_ranks(num_prompts, group_size, num_updates):
    whole = [set(*update) for update in split_over(1, num_prompts, group_size, num_updates)]
    for num_ranks in (2, 4):
        samples = num_prompts * group_size // num_ranks
        if num_prompts % num_ranks or samples % num_updates:
            continue  # is refused
        split = split_over(num_ranks, num_prompts, group_size, num_updates)
        assert [set().union(*update) for update in split] == whole
        assert {len(rows) for update in split for rows in update} == {samples // num_updates}, "on every rank alike"


@pytest.mark.parametrize(("num_prompts", "group_size", "num_updates"), SPLITS)
def test_every_sample_is_in_one_update_and_blocks_are_spread_evenly(num_prompts, group_size, num_updates):
    updates = [rows for (rows,) in split_over(1, num_prompts, group_size, num_updates)]
    assert sorted(row for rows in updates for row in rows) == list(range(num_prompts * group_size))
    assert len({len(rows) for rows in updates}) == 1
    block = prompts_per_block(group_size, num_updates) * group_size
    for start in range(0, num_prompts * group_size, block):
        counts = [sum(start <= row < start + block for row in rows) for rows in updates]
        assert set(counts) == {block // num_updates}


@pytest.mark.parametrize(("num_prompts", "group_size", "num_updates"), [(1, 4, 2), (2, 2, 4)])
def test_every_sample_comes_into_every_update(num_prompts, group_size, num_updates):
    places = Counter()
    for seed in range(400):
        for update, (rows,) in enumerate(split_over(1, num_prompts, group_size, num_updates, seed)):
            places.update((update, row) for row in rows)
    assert len(places) == num_updates * num_prompts * group_size
    expected = 400 / num_updates
    assert all(abs(count - expected) < 5 * expected**0.5 for count in places.values()), "five standard deviations"


def test_a_block_is_the_fewest_prompts_that_can_be_shared_evenly():
    assert [prompts_per_block(8, updates) for updates in (1, 4, 8, 16, 32, 6, 5)] == [1, 1, 1, 2, 4, 3, 5]


def test_the_split_of_a_block_depends_on_its_own_seed_alone():
    alone = update_rows([7], group_size=6, num_updates=4)
    among = update_rows([1, 7, 2], group_size=6, num_updates=4)
    assert [[row - 12 for row in rows if 12 <= row < 24] for rows in among] == alone
    assert update_rows([8], group_size=6, num_updates=4) != alone


LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 12), st.integers(0, 5))
def test_chunks_hold_every_row_once_and_balanced_ones_are_close_to_the_mean(lengths, num_chunks, seed):
    rows = list(range(len(lengths)))
    balanced = balanced_chunks(rows, lengths, num_chunks=num_chunks, seed=seed)
    equal = equal_chunks(rows, num_chunks=num_chunks, seed=seed)
    for chunks in (balanced, equal):
        assert len(chunks) == num_chunks
        assert sorted(row for chunk in chunks for row in chunk) == rows
    counts = [len(chunk) for chunk in equal]
    assert max(counts) - min(counts) <= 1
    tokens = [sum(lengths[row] for row in chunk) for chunk in balanced]
    assert tokens == sorted(tokens, reverse=True)
    # The chunk's last row found it the smallest of all, with no more than the mean.
    assert max(tokens) <= sum(lengths) / num_chunks + min(lengths[row] for row in balanced[0])


def test_balanced_chunks_worked_by_hand():
    lengths = {10: 5, 11: 9, 12: 4, 13: 7, 14: 3}
    assert balanced_chunks([10, 11, 12, 13, 14], lengths, num_chunks=2, seed=0) == [[13, 10, 14], [11, 12]]
    assert balanced_chunks([12, 10], lengths, num_chunks=3, seed=0) == [[10], [12], []]


@pytest.mark.parametrize("chunks_of", [equal_chunks, partial(balanced_chunks, lengths=[7] * 24)])
def test_rows_of_equal_length_are_split_at_random_and_always_alike(chunks_of):
    rows = list(range(24))
    chunks = chunks_of(rows, num_chunks=4, seed=3)
    assert [len(chunk) for chunk in chunks] == [6] * 4
    assert chunks != [rows[i : i + 6] for i in range(0, 24, 6)]
    assert chunks == chunks_of(rows, num_chunks=4, seed=3) != chunks_of(rows, num_chunks=4, seed=4)


@given(st.lists(st.integers(1, 99), min_size=32, max_size=32), st.integers(1, 11), st.booleans())
def test_an_update_takes_the_same_samples_whatever_their_lengths_and_however_many_its_micro_batches(
    lengths, window, is_packed
):
    def updates(split, lengths):
        batches = split.micro_batch_rows(range(16, 24), lengths)
        starts = range(0, len(batches), split.window)
        return [sorted(row for rows in batches[start : start + split.window] for row in rows) for start in starts]

    split = Split(seed=1, group_size=4, num_updates=2, window=window, is_packed=is_packed)
    assert updates(split, lengths) == updates(split._replace(window=1, is_packed=False), [5] * 32)


class Ranks(SingleDeviceStrategy):
    """Reduces with the values that other ranks would give, in order."""

    def __init__(self, *others):
        super().__init__("cpu")
        self.others = list(others)

    def reduce(self, tensor, reduce_op):
        stacked = torch.stack([tensor, torch.tensor(self.others.pop(0), dtype=tensor.dtype)])
        return {"max": stacked.amax, "mean": stacked.mean}[reduce_op](0)


SPLIT = Split(seed=0, group_size=2, num_updates=1, window=2, is_packed=True)


@pytest.mark.parametrize("is_packed", [True, False])
def test_what_a_split_loses_worked_by_hand(is_packed):
    lengths, other = [9, 1, 4, 6], [20.0, 10.0, 30.0]
    batches, lost = split_rollout(
        SPLIT._replace(is_packed=is_packed), range(2), lengths, Ranks(other, other), max_tokens=None
    )
    places = [10, 10] if is_packed else [len(rows) * max(lengths[row] for row in rows) for rows in batches]
    imbalance = (max(places[0], 20) + max(places[1], 10)) / ((sum(places) + 30) / 2)
    assert lost["token_imbalance"] == pytest.approx(imbalance)
    assert lost["padding_fraction"] == pytest.approx(1 - (20 + 30) / (sum(places) + 30))


def test_alone_and_packed_nothing_is_lost():
    _, lost = split_rollout(SPLIT, range(2), [9, 1, 4, 6], SingleDeviceStrategy("cpu"))
    assert lost == {"token_imbalance": 1.0, "padding_fraction": 0.0}


@pytest.mark.parametrize(("limit", "window"), [(28, 1), (27, 2), (14, 2), (13, 3), (10, 3), (9, 4), (8, 6)])
def test_the_number_of_micro_batches_that_fit_worked_by_hand(limit, window):
    lengths = [9, 1, 4, 6, 7, 1]  # 28; 14, 14; 10, 9, 9; 9, 7, 6, 6; never less than 9
    assert SPLIT._replace(window=1).fitting_window(range(3), lengths, max_tokens=limit) == window


def test_a_limit_that_a_micro_batch_of_any_rank_is_beyond_stops_all_with_the_number_to_set():
    lengths, alone = [9, 1, 4, 6], SingleDeviceStrategy("cpu")
    split_rollout(SPLIT, range(2), lengths, alone, max_tokens=10)
    with pytest.raises(SettingError, match=r"has 10 tokens, more than `data\.max_tokens_per_batch` 9; set") as stop:
        split_rollout(SPLIT, range(2), lengths, alone, max_tokens=9)
    assert stop.match(r"set `trainer\.accumulate_grad_batches` to 3 or more, now 2")
    with pytest.raises(SettingError, match=r"; set that to 9 or more, the tokens of the longest sample"):
        split_rollout(SPLIT, range(2), lengths, alone, max_tokens=8)
    other = [[11.0, 10.0, 21.0]] * 2 + [[8, 4]]
    with pytest.raises(SettingError, match=r"has 11 tokens.*to 4 or more"):
        split_rollout(SPLIT, range(2), lengths, Ranks(*other), max_tokens=10)


def test_sizes_of_updates_worked_by_hand():
    completions = [Completion(list(range(n)), [0.0] * n, "stop") for n in (1, 2, 3, 4, 5)]
    rollout = Rollout(["p"] * 5, [[0]] * 5, completions, [""] * 5, {}, 1, torch.zeros(5))
    sizes = update_sizes(rollout, [[4], [0, 1], [2]], 2)
    assert sizes.tolist() == [[8.0, 3.0], [3.0, 1.0]]
    assert sizes.dtype == torch.float64
    rollout.rewards[torch.tensor([0, 4])] = torch.nan  # dropped
    assert update_sizes(rollout, [[4], [0, 1], [2]], 2).tolist() == [[2.0, 1.0], [3.0, 1.0]]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_ranks": 3}, r"`data\.num_prompts` 8 must be a multiple of the 3 ranks"),
        ({"num_updates": 5}, r"= 16 completions on each of 2 ranks cannot be split evenly into `data\.num_updates` 5"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes, message):
    with pytest.raises(SettingError, match=message):
        check_batch_sizes(**{"num_prompts": 8, "group_size": 4, "num_updates": 4, "window": 2, "num_ranks": 2} | sizes)


@pytest.mark.parametrize(
    ("window", "words"),
    [
        (2, "2 micro-batches of about 2 on 2 rank(s)"),
        (3, "3 micro-batches of about 1.3 on 2 rank(s)"),
        (6, "6 micro-batches of about 0.7 on 2 rank(s); 2 of them are empty"),
    ],
)
def test_the_sizes_in_words(window, words):
    found = check_batch_sizes(num_prompts=8, group_size=4, num_updates=4, window=window, num_ranks=2)
    assert found == f"8 prompts x 4 samples = 32 completions -> 4 updates of 8, each in {words}"
