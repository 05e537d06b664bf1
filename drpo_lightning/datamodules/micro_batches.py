"""Which samples of a rollout an optimizer update takes, and how they are put into micro-batches."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
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


def shuffled_chunks(rows: Sequence[int], *, num_chunks: int, seed: int) -> list[list[int]]:
    """Puts rows into chunks at random, equally many into each if they can be divided so."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [[rows[place] for place in chunk] for chunk in (part.tolist() for part in order.chunk(num_chunks))]


def micro_batch_rows(positions: range, *, seed: int, group_size: int, num_updates: int, window: int) -> list[list[int]]:
    """Samples of each micro-batch of a rank's rollout, the updates one after the other.

    Args:
        positions: where this rank's prompts stand in the stream of prompts.
        seed: of the split.
        group_size: samples per prompt.
        num_updates: updates of the rollout.
        window: micro-batches of an update.
    """
    updates = update_rows(
        [seed_of(seed, "split", position) for position in positions[:: prompts_per_block(group_size, num_updates)]],
        group_size=group_size,
        num_updates=num_updates,
    )
    seeds = [seed_of(seed, "micro-batches", positions.start, update) for update in range(num_updates)]
    chunks = [shuffled_chunks(rows, num_chunks=window, seed=s) for rows, s in zip(updates, seeds, strict=True)]
    return [chunk for update in chunks for chunk in update]


def update_sizes(rollout: Rollout, micro_batches: Sequence[Sequence[int]], window: int) -> Float[Tensor, "updates 2"]:
    """Completion tokens and sequences of each optimizer update, without dropped samples, in float64.

    Args:
        rollout: this rank's rollout.
        micro_batches: rows of each micro-batch, the updates one after the other; the last may be incomplete.
        window: micro-batches of an update.
    """
    is_kept = rollout.is_kept.tolist()
    kept = [[row for row in rows if is_kept[row]] for rows in micro_batches]
    sizes = torch.tensor(
        [[sum(len(rollout.completions[row].token_ids) for row in rows), len(rows)] for rows in kept],
        dtype=torch.float64,
    )
    return torch.stack([sizes[start : start + window].sum(0) for start in range(0, len(sizes), window)])


def check_batch_sizes(*, num_prompts: int, group_size: int, num_updates: int, window: int, num_ranks: int) -> str:
    """Checks that rollouts can be split evenly.

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
    if num_prompts % num_ranks:
        raise SettingError(f"`data.num_prompts` {num_prompts} must be a multiple of the {num_ranks} ranks")
    samples, micro_batches = num_prompts * group_size // num_ranks, num_updates * window
    if samples % micro_batches:
        raise SettingError(
            f"`data.num_prompts` x `data.group_size` = {samples} completions on each of {num_ranks} ranks cannot be "
            f"split evenly into `data.num_updates` {num_updates} x `trainer.accumulate_grad_batches` {window} = "
            f"{micro_batches} micro-batches"
        )
    return (
        f"Rollout: {num_prompts} prompts x {group_size} samples = {samples * num_ranks} completions -> "
        f"{num_updates} updates of {samples * num_ranks // num_updates}, each in {window} micro-batches of "
        f"{samples // micro_batches} on {num_ranks} rank(s)"
    )
