"""Prompts are exchanged among ranks: about as many tokens on each, and the same updates as before."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drpo_lightning.batch import Completion, Rollout
from drpo_lightning.datamodules.micro_batches import Split
from drpo_lightning.datamodules.rank_balance import balance_ranks, balanced_blocks
from drpo_lightning.datamodules.rollout_state import dealt_out, rollout_from_state, rollout_to_state
from tests.datamodules.thread_ranks import Ranks


def make_rollout(positions, group_size, lengths):
    """A prompt of one token at each position; the lengths of its samples are those of the position."""
    samples = [(position, sample) for position in positions for sample in range(group_size)]
    return Rollout(
        prompts=[f"p{position}" for position, _ in samples],
        prompt_ids=[[position] for position, _ in samples],
        completions=[
            Completion([sample] * lengths[position][sample], [-1.0] * lengths[position][sample], "stop")
            for position, sample in samples
        ],
        texts=[f"{position} {sample}" for position, sample in samples],
        columns={"cannot travel": [object() for _ in samples]},
        group_size=group_size,
        rewards=torch.tensor([position + sample / 100 for position, sample in samples]),
        reward_parts={"one": torch.tensor([float(position) for position, _ in samples])},
        prompt_numbers=[position * 10 for position, _ in samples],
        positions=[position for position, _ in samples],
    )


def split_of(group_size, num_updates):
    return Split(seed=3, group_size=group_size, num_updates=num_updates, window=2, is_packed=True)


def exchanged(rollouts, split):
    ranks = Ranks(len(rollouts))
    return ranks.run(
        lambda rank: balance_ranks(
            rollouts[rank],
            split,
            rank=rank,
            num_ranks=len(rollouts),
            of_all_ranks=lambda value: ranks.gather(rank, value),
        )
    )


def updates_of(rollouts, split):
    """Texts of the samples of each update, over all ranks."""
    updates = []
    for rollout in rollouts:
        rows = split.micro_batch_rows(rollout.positions[:: rollout.group_size], rollout.lengths)
        updates.append([sorted(rollout.texts[row] for row in rows[i] + rows[i + 1]) for i in range(0, len(rows), 2)])
    return [sorted(text for part in parts for text in part) for parts in zip(*updates, strict=True)]


def make_ranks(data, num_ranks, group_size, num_updates):
    split = split_of(group_size, num_updates)
    per_rank = 2 * split.samples_per_block // group_size
    count = num_ranks * per_rank
    rows = st.lists(st.integers(0, 40), min_size=group_size, max_size=group_size)
    lengths = data.draw(st.lists(rows, min_size=count, max_size=count))
    starts = range(8, 8 + count, per_rank)
    lengths = dict(enumerate(lengths, start=8))
    return [make_rollout(range(start, start + per_rank), group_size, lengths) for start in starts], split, lengths


@given(st.data(), st.sampled_from([1, 2, 4]), st.sampled_from([(2, 1), (4, 2), (2, 4), (3, 2)]))
def test_every_sample_is_on_one_rank_with_all_of_its_fields_and_in_the_same_update(data, num_ranks, sizes):
    rollouts, split, lengths = make_ranks(data, num_ranks, *sizes)
    balanced = exchanged(rollouts, split)
    for rollout in balanced:
        assert len(rollout) == len(rollouts[0])
        expected = make_rollout(rollout.positions[:: sizes[0]], sizes[0], lengths)
        assert rollout.columns == {}
        for name in ("prompts", "prompt_ids", "completions", "texts", "prompt_numbers", "positions"):
            assert getattr(rollout, name) == getattr(expected, name)
        assert torch.equal(rollout.rewards, expected.rewards)
        assert torch.equal(rollout.reward_parts["one"], expected.reward_parts["one"])
    assert Counter(p for r in balanced for p in r.positions) == Counter(p for r in rollouts for p in r.positions)
    assert updates_of(balanced, split) == updates_of(rollouts, split)
    assert all("cannot travel" in rollout.columns for rollout in rollouts), "the rollout itself is left alone"


@given(st.data(), st.sampled_from([(2, 1), (4, 2), (2, 4)]))
def test_a_balanced_rollout_is_resumed_on_another_number_of_ranks(data, sizes):
    rollouts, split, _ = make_ranks(data, 4, *sizes)
    states = [rollout_to_state(rollout) for rollout in exchanged(rollouts, split)]
    resumed = [rollout_from_state(dealt_out(states, rank=rank, num_ranks=2)) for rank in range(2)]
    assert [p for r in resumed for p in r.positions] == [p for r in rollouts for p in r.positions]
    assert [text for r in resumed for text in r.texts] == [text for r in rollouts for text in r.texts]
    assert updates_of(resumed, split) == updates_of(rollouts, split)


def test_the_longest_block_goes_first_to_where_there_is_least():
    assert balanced_blocks([[9], [8], [2], [1]], 2) == [[0, 3], [1, 2]]
    assert balanced_blocks([[9], [1], [1], [1]], 2) == [[0, 3], [1, 2]]  # equally many blocks, come what may


def test_tokens_are_balanced_in_every_update():
    # By their sums, 10 each, all blocks are alike.
    assert balanced_blocks([[10, 0], [10, 0], [0, 10], [0, 10]], 2) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("num_ranks", [2, 8])
def test_uneven_lengths_cost_little(num_ranks):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.exp(torch.randn(64, 8, generator=generator) * 0.4 + torch.randn(64, 1, generator=generator) + 5)
    split = split_of(8, 4)
    per_rank = 64 // num_ranks
    rollouts = [
        make_rollout(range(start, start + per_rank), 8, dict(enumerate(lengths.long().tolist())))
        for start in range(0, 64, per_rank)
    ]

    def imbalance(rollouts):
        tokens = torch.tensor(
            [split.block_tokens(r.positions[::8], r.lengths) for r in rollouts], dtype=torch.float64
        ).sum(1)
        return float(tokens.amax(0).sum() / tokens.mean(0).sum())

    before, after = imbalance(rollouts), imbalance(exchanged(rollouts, split))
    assert after - 1 < 0.5 * (before - 1)
