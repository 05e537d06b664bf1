"""The trainer's ranks as users of engines: what one of them meets, all learn of."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from torch import distributed as dist

from drpo_lightning.errors import SettingError
from drpo_lightning.rollout.engine import EngineError, WaitEnded

T = TypeVar("T")


Failure = EngineError | SettingError | WaitEnded
FAILURES = (EngineError, SettingError, WaitEnded)


def attempt(compute: Callable[[], T]) -> T | Failure:
    """The result, or the error; whatever it is, the other ranks have to learn of it."""
    try:
        return compute()
    except FAILURES as error:
        return error
    except Exception as error:  # noqa: BLE001
        failure = EngineError(f"{type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure


class Ranks:
    """All ranks of the trainer, with a group of their own for objects on the host.

    Args:
        timeout_seconds: how long they wait for each other.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._group: dist.ProcessGroup | None = None

    @property
    def number(self) -> int:
        """This one's."""
        return 0 if self._group is None else self._group.rank()

    def join(self) -> None:
        """Forms the group, unless it is there. Collective."""
        if self._group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(timeout=timedelta(seconds=self._timeout_seconds), backend="gloo")

    def leave(self) -> None:
        """Forgets the group. Not collective."""
        self._group = None

    def share(self, outcome: T | Failure) -> T:
        """The first rank's outcome on every rank, raised if it is an error. Collective.

        Args:
            outcome: of the first rank; of no meaning on the others.
        """
        if self._group is not None:
            box: list[Any] = [outcome]
            self._wait(lambda: dist.broadcast_object_list(box, group=self._group, group_src=0))
            outcome = box[0]
        if isinstance(outcome, FAILURES):
            raise outcome
        return outcome

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in their order. Collective."""
        values: list[Any] = [value]
        if self._group is not None:
            values *= self._group.size()
            self._wait(lambda: dist.all_gather_object(values, value, group=self._group))
        return values

    def agree(self, outcome: T | Failure) -> T:
        """Each rank its own outcome; raised on every rank if one is an error. Collective."""
        failure = outcome if isinstance(outcome, FAILURES) else None
        failures = self.gather(failure)
        if failure is not None:
            raise failure
        for number, other in enumerate(failures):
            if other is not None:
                raise type(other)(f"rank {number}: {other}")
        return outcome  # type: ignore[return-value]

    def _wait(self, collective: Callable[[], object]) -> None:
        try:
            collective()
        except RuntimeError as error:
            raise EngineError(
                f"another rank ended, or did not come within {self._timeout_seconds:g} s; its own output says why: "
                f"{error}"
            ) from error
