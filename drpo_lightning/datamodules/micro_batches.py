"""Which samples of a rollout an optimizer update takes, and how they are put into micro-batches."""

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from drpo_lightning.batch import Rollout
from drpo_lightning.datamodules.seeds import seed_of
from drpo_lightning.errors import SettingError


def prompts_per_block(group_size: int, num_updates: int) -> int:
    """Fewest prompts whose samples can be shared evenly among the updates.

    Every rank has a whole number of such blocks if its samples can be: which samples make an update can be decided
    block by block, whichever rank has the block.
    """
    return num_updates // math.gcd(group_size, num_updates)


def update_rows(seeds: Sequence[int], *, group_size: int, num_updates: int) -> list[list[int]]:
    """The samples of each optimizer update, whichever ranks hold them.

    The samples of each block of prompts are dealt out to the updates at random, equally many to each.

    Args:
        seeds: one for each of this rank's blocks of `prompts_per_block` prompts, the same on whichever rank it is.
        group_size: samples per prompt.
        num_updates: updates of the rollout.

    Returns:
        Rows of this rank's rollout, a list per update.
    """
    size = prompts_per_block(group_size, num_updates) * group_size
    updates: list[list[int]] = [[] for _ in range(num_updates)]
    for block, seed in enumerate(seeds):
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        for rows, dealt in zip(updates, order.view(num_updates, -1).tolist(), strict=True):
            rows.extend(block * size + row for row in dealt)
    return updates


def equal_chunks(rows: Sequence[int], *, num_chunks: int, seed: int) -> list[list[int]]:
    """Puts rows into chunks at random, equally many into each, or one more into some; chunks may be empty."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [[rows[place] for place in part.tolist()] for part in order.tensor_split(num_chunks)]


def balanced_chunks(rows: Sequence[int], lengths: Sequence[int], *, num_chunks: int, seed: int) -> list[list[int]]:
    """Puts rows into chunks of about as many tokens, the largest chunk first; chunks may be empty.

    The longest row goes first, and each into the chunk that has fewest tokens by then: the largest chunk has at most
    4/3 of the tokens of the best split (Graham 1969), and with many rows hardly more than the mean. Sorted by size, the
    chunks of several ranks that are computed at the same time are alike.

    Args:
        rows: numbers of samples.
        lengths: tokens of every sample of the rollout.
        num_chunks: how many.
        seed: of the order of rows of equal length.
    """
    (shuffled,) = equal_chunks(rows, num_chunks=1, seed=seed)
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    smallest = [(0, number) for number in range(num_chunks)]
    for row in sorted(shuffled, key=lambda row: -lengths[row]):
        tokens, number = smallest[0]
        chunks[number].append(row)
        heapq.heapreplace(smallest, (tokens + lengths[row], number))
    return [chunks[number] for _, number in sorted(smallest, key=lambda chunk: (-chunk[0], chunk[1]))]


class Split(NamedTuple):
    """How a rank's rollout is split.

    Attributes:
        seed: of the split.
        group_size: samples per prompt.
        num_updates: updates of the rollout.
        window: micro-batches of an update.
        is_packed: True if micro-batches are balanced by tokens, False if by samples, each of which is as long as the
            longest then.
    """

    seed: int
    group_size: int
    num_updates: int
    window: int
    is_packed: bool

    @property
    def samples_per_block(self) -> int:
        """Samples of `prompts_per_block` prompts."""
        return prompts_per_block(self.group_size, self.num_updates) * self.group_size

    def _block_seeds(self, positions: Sequence[int]) -> list[int]:
        """Of each block, what decides which of its samples an update takes; see `micro_batch_rows`."""
        firsts = positions[:: prompts_per_block(self.group_size, self.num_updates)]
        return [seed_of(self.seed, "split", position) for position in firsts]

    def _update_rows(self, seeds: Sequence[int]) -> list[list[int]]:
        return update_rows(seeds, group_size=self.group_size, num_updates=self.num_updates)

    def block_tokens(self, positions: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """Tokens that each of this rank's blocks has in each update.

        Args:
            positions: see `micro_batch_rows`.
            lengths: likewise.
        """
        starts = range(0, len(lengths), self.samples_per_block)
        return [
            [sum(lengths[start + row] for row in rows) for rows in self._update_rows([seed])]
            for start, seed in zip(starts, self._block_seeds(positions), strict=True)
        ]

    def micro_batch_rows(self, positions: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """Samples of each micro-batch of the rollout, the updates one after the other.

        Args:
            positions: this rank's prompts of the rollout among those of all rollouts.
            lengths: tokens of every sample, prompt and completion.
        """
        batches = []
        for update, rows in enumerate(self._update_rows(self._block_seeds(positions))):
            seed = seed_of(self.seed, "micro-batches", positions[0], update)
            if self.is_packed:
                batches += balanced_chunks(rows, lengths, num_chunks=self.window, seed=seed)
            else:
                batches += equal_chunks(rows, num_chunks=self.window, seed=seed)
        return batches

    def num_places(self, rows: Sequence[int], lengths: Sequence[int]) -> int:
        """Tokens that the network computes for a micro-batch, with its padding if it is not packed."""
        of_rows = [lengths[row] for row in rows]
        return sum(of_rows) if self.is_packed else len(of_rows) * max(of_rows, default=0)

    def fitting_window(self, positions: Sequence[int], lengths: Sequence[int], *, max_tokens: int) -> int:
        """Fewest micro-batches of an update, from `window` on, of which none has more than `max_tokens`.

        As many as an update has samples if none does.

        Args:
            positions: see `micro_batch_rows`.
            lengths: likewise.
            max_tokens: limit of `num_places`.
        """
        samples = max(len(lengths) // self.num_updates, self.window)
        for window in range(self.window, samples):
            batches = self._replace(window=window).micro_batch_rows(positions, lengths)
            if max(self.num_places(rows, lengths) for rows in batches) <= max_tokens:
                return window
        return samples


def update_sizes(rollout: Rollout, micro_batches: Sequence[Sequence[int]], window: int) -> Float[Tensor, "updates 2"]:
    """Completion tokens and sequences of each optimizer update, without dropped and masked samples, in float64.

    Args:
        rollout: this rank's rollout.
        micro_batches: rows of each micro-batch, the updates one after the other; the last may be incomplete.
        window: micro-batches of an update.
    """
    is_trained = rollout.is_trained.tolist()
    trained = [[row for row in rows if is_trained[row]] for rows in micro_batches]
    sizes = torch.tensor(
        [[sum(len(rollout.completions[row].token_ids) for row in rows), len(rows)] for rows in trained],
        dtype=torch.float64,
    )
    return torch.stack([sizes[start : start + window].sum(0) for start in range(0, len(sizes), window)])


def split_rollout(
    split: Split,
    positions: Sequence[int],
    lengths: Sequence[int],
    strategy: Strategy,
    *,
    max_tokens: int | None = None,
) -> tuple[list[list[int]], dict[str, float]]:
    """Splits each rank's rollout into micro-batches. Collective.

    Args:
        split: how.
        positions: this rank's prompts of the rollout among those of all rollouts.
        lengths: tokens of every sample of this rank, prompt and completion.
        strategy: Lightning's strategy.
        max_tokens: most tokens of a micro-batch that the network may have to compute; None sets no limit.

    Returns:
        Samples of each micro-batch of this rank, the updates one after the other, and what is lost by the split:
        `token_imbalance` is what the rank with most to compute has, over the mean of the ranks, added up over
        micro-batches: how much longer it takes ranks that wait for each other after each one, 1 if there is one rank.
        `padding_fraction` is the share of padding in what is computed.

    Raises:
        SettingError: on every rank, if a micro-batch of any of them has more than `max_tokens`.
    """
    batches = split.micro_batch_rows(positions, lengths)
    tokens = sum(lengths)
    computed = torch.tensor([*(split.num_places(rows, lengths) for rows in batches), tokens], dtype=torch.float64)
    largest = strategy.reduce(computed.to(strategy.root_device), reduce_op="max").tolist()[:-1]
    mean = strategy.reduce(computed.to(strategy.root_device), reduce_op="mean").tolist()
    if max_tokens is not None and max(largest) > max_tokens:
        sizes = [max(lengths), split.fitting_window(positions, lengths, max_tokens=max_tokens)]
        longest, window = strategy.reduce(torch.tensor(sizes, device=strategy.root_device), reduce_op="max").tolist()
        raise SettingError(
            f"a micro-batch has {max(largest):.0f} tokens, more than `data.max_tokens_per_batch` {max_tokens}; "
            + (
                f"set `trainer.accumulate_grad_batches` to {window} or more, now {split.window}"
                if longest <= max_tokens
                else f"set that to {longest} or more, the tokens of the longest sample"
            )
        )
    places = sum(mean[:-1])
    return batches, {"token_imbalance": sum(largest) / places, "padding_fraction": 1 - mean[-1] / places}


def check_batch_sizes(*, num_prompts: int, group_size: int, num_updates: int, window: int, num_ranks: int) -> str:
    """Checks that rollouts can be split evenly into updates.

    Args:
        num_prompts: prompts of a rollout, over all ranks.
        group_size: samples per prompt.
        num_updates: updates of a rollout.
        window: micro-batches of an update.
        num_ranks: processes of the trainer.

    Returns:
        The sizes in words.

    Raises:
        SettingError: if not, naming the settings.
    """
    if window < 1:
        raise SettingError(f"`trainer.accumulate_grad_batches` must be at least 1, got {window}")
    if num_prompts % num_ranks:
        raise SettingError(f"`data.num_prompts` {num_prompts} must be a multiple of the {num_ranks} ranks")
    samples = num_prompts * group_size // num_ranks
    if samples % num_updates:
        raise SettingError(
            f"`data.num_prompts` x `data.group_size` = {samples} completions on each of {num_ranks} ranks cannot be "
            f"split evenly into `data.num_updates` {num_updates} updates"
        )
    per_update = samples // num_updates
    is_divisible = per_update % window == 0
    return (
        f"{num_prompts} prompts x {group_size} samples = {samples * num_ranks} completions -> "
        f"{num_updates} updates of {per_update * num_ranks}, each in {window} micro-batches of "
        f"about {per_update / window:.{0 if is_divisible else 1}f} on {num_ranks} rank(s)"
        + (f"; {window - per_update} of them are empty" if window > per_update else "")
    )
