"""Which samples an update takes: the same on any number of ranks, each exactly once."""

from collections import Counter

import pytest
import torch

from drpo_lightning.batch import Completion, Rollout
from drpo_lightning.datamodules.micro_batches import (
    check_batch_sizes,
    prompts_per_block,
    shuffled_chunks,
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


def test_chunks_hold_every_row_once_in_a_random_order():
    rows = list(range(100, 124))
    chunks = shuffled_chunks(rows, num_chunks=4, seed=3)
    assert [len(chunk) for chunk in chunks] == [6] * 4
    assert sorted(row for chunk in chunks for row in chunk) == rows
    assert chunks != [rows[i : i + 6] for i in range(0, 24, 6)]
    assert chunks == shuffled_chunks(rows, num_chunks=4, seed=3) != shuffled_chunks(rows, num_chunks=4, seed=4)


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
        ({"window": 3}, r"= 16 completions on each of 2 ranks cannot be split evenly into `data\.num_updates` 4 x"),
        ({"num_updates": 5}, r"`data\.num_updates` 5 x `trainer\.accumulate_grad_batches` 2 = 10 micro-batches"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(sizes, message):
    with pytest.raises(SettingError, match=message):
        check_batch_sizes(**{"num_prompts": 8, "group_size": 4, "num_updates": 4, "window": 2, "num_ranks": 2} | sizes)


def test_the_sizes_in_words():
    words = check_batch_sizes(num_prompts=8, group_size=4, num_updates=4, window=2, num_ranks=2)
    assert words == (
        "Rollout: 8 prompts x 4 samples = 32 completions -> 4 updates of 8, each in 2 micro-batches of 2 on 2 rank(s)"
    )
