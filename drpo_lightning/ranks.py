"""What the ranks of a run tell each other."""

from typing import Any, TypeVar

import torch.distributed

T = TypeVar("T")


def of_all_ranks(value: T, num_ranks: int) -> list[T]:
    """The value of every rank, in their order. Collective.

    Args:
        value: this rank's; it is pickled on several ranks.
        num_ranks: of the run, `trainer.world_size`.
    """
    if num_ranks == 1:
        return [value]
    values: list[Any] = [None] * num_ranks
    torch.distributed.all_gather_object(values, value)
    return values
