"""A loader whose batches are made when they are asked for."""

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

Batch = TypeVar("Batch")


class BatchLoader(Generic[Batch]):
    """Yields the batches that a function makes anew each time the loader is iterated over.

    It has a length, since Lightning fetches ahead from a loader without one, and would make the next rollout before
    the last update on this one. Nothing runs before the first batch is asked for.

    Args:
        num_batches: how many batches there are, as far as nothing has been taken of them yet.
        make_batches: makes them; a generator.
    """

    def __init__(self, num_batches: int, make_batches: Callable[[], Iterator[Batch]]) -> None:
        self.num_batches = num_batches
        self.make_batches = make_batches

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Batch]:
        return self.make_batches()

    def state_dict(self) -> dict[str, Any]:
        """Empty: the state is the data module's, which Lightning restores at the end of an epoch too."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to restore, see `state_dict`."""
