"""Which of a rollout's prompts each rank trains on: about as many tokens on each, in every update."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from drpo_lightning.batch import Rollout
from drpo_lightning.datamodules.micro_batches import Split
from drpo_lightning.datamodules.rollout_parts import joined, selected


def balanced_blocks(loads: Sequence[Sequence[int]], num_ranks: int) -> list[list[int]]:
    """Deals blocks of prompts out to ranks, equally many to each, of about as many tokens in every update.

    The block with most tokens goes first, and each to the rank, of those that have room, whose tokens so far are least
    where the block has its own: by the scalar product of the two over updates. With one update that is the rank that
    has least, as in `balanced_chunks`.

    Args:
        loads: tokens of each block in each update.
        num_ranks: a divisor of the number of blocks.

    Returns:
        Numbers of the blocks of each rank, in their order.
    """
    blocks = torch.tensor(loads, dtype=torch.float64)
    room = len(loads) // num_ranks
    tokens = torch.zeros(num_ranks, blocks.shape[1], dtype=torch.float64)
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    for block in blocks.sum(1).sort(descending=True, stable=True).indices.tolist():
        overlap = tokens @ blocks[block]
        overlap[[len(numbers) == room for numbers in dealt]] = torch.inf
        rank = int(overlap.argmin())
        dealt[rank].append(block)
        tokens[rank] += blocks[block]
    return [sorted(numbers) for numbers in dealt]


def balance_ranks(
    rollout: Rollout, split: Split, *, rank: int, num_ranks: int, of_all_ranks: Callable[[Any], list[Any]]
) -> Rollout:
    """Exchanges blocks of prompts among the ranks, see `balanced_blocks`. Collective.

    Which samples make an update is decided block by block, whichever rank has the block: that does not change.

    Args:
        rollout: this rank's, with as many blocks as any other's.
        split: how its samples become updates.
        rank: this rank.
        num_ranks: how many there are.
        of_all_ranks: gathers a value from every rank, in their order.

    Returns:
        This rank's part, without `columns`, which may hold what does not travel.
    """
    size = split.samples_per_block
    loads = of_all_ranks(split.block_tokens(rollout.positions[:: rollout.group_size], rollout.lengths))
    per_rank = len(loads[rank])
    plan = balanced_blocks([block for part in loads for block in part], num_ranks)
    fields = {**vars(rollout), "columns": {}}
    own = {
        rank * per_rank + i: selected(fields, range(i * size, (i + 1) * size)) for i in range(per_rank)
    }  # by number among the blocks of all ranks
    leaving = {number: part for number, part in own.items() if number not in plan[rank]}
    parts = own | {number: part for moved in of_all_ranks(leaving) for number, part in moved.items()}
    return Rollout(**joined([parts[number] for number in plan[rank]]))
