"""Requests that are answered while nobody waits for them."""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from drpo_lightning.batch import Completion
from drpo_lightning.rollout.engine import EngineError, Request
from drpo_lightning.rollout.server.dispatch import Dispatcher


class _Submitted(NamedTuple):
    """A request, and the task that has its completions in the end."""

    request: Request
    task: asyncio.Task[list[Completion]]

    @property
    def is_answered(self) -> bool:
        return self.task.done() and not self.has_failed

    @property
    def has_failed(self) -> bool:
        return self.task.cancelled() or (self.task.done() and self.task.exception() is not None)


class RequestsAhead:
    """What a rank has submitted and not taken yet. To be used in the event loop alone.

    A failure of a request is kept until it is collected, or the next sync, after which it is begun anew.

    Args:
        dispatcher: asks the servers.
        timeout_seconds: how long `collect` waits.
    """

    def __init__(self, dispatcher: Dispatcher, timeout_seconds: float) -> None:
        self._dispatcher = dispatcher
        self._timeout_seconds = timeout_seconds
        self._submitted: dict[int, _Submitted] = {}
        self._watcher: asyncio.Task[None] | None = None

    async def submit(self, requests: Sequence[Request]) -> None:
        """Begins with requests; see `RolloutEngine.submit`."""
        for request in requests:
            task = asyncio.create_task(self._dispatcher.answer(request, is_awaited=False))
            self._submitted[request.number] = _Submitted(request, task)
        if self._watcher is None and not all(submitted.is_answered for submitted in self._submitted.values()):
            self._watcher = asyncio.create_task(self._dispatcher.watch())

    async def collect(self, numbers: Sequence[int]) -> dict[int, list[Completion]]:
        """See `RolloutEngine.collect`.

        Raises:
            EngineError: if it takes too long, or as one of these requests has failed.
            SettingError: likewise.
        """
        if numbers:
            done, pending = await asyncio.wait(
                [self._submitted[number].task for number in numbers],
                timeout=self._timeout_seconds,
                return_when=asyncio.FIRST_EXCEPTION,
            )
            for task in done:
                task.result()  # raises how it failed
            if pending:
                raise too_slow(self._timeout_seconds)
        return self._take(numbers)

    async def finished(self) -> dict[int, list[Completion]]:
        """See `RolloutEngine.finished`."""
        return self._take([number for number, submitted in self._submitted.items() if submitted.is_answered])

    def _take(self, numbers: Iterable[int]) -> dict[int, list[Completion]]:
        return {number: self._submitted.pop(number).task.result() for number in numbers}

    async def hold(self) -> None:
        """Watches no server until `go_on`: they pause, and get other weights. What is in flight stays so."""
        await _end([] if self._watcher is None else [self._watcher])
        self._watcher = None

    async def give_up(self) -> None:
        """Gives up what is in flight, until `go_on`. What has been answered stays."""
        await self.hold()
        await _end([submitted.task for submitted in self._submitted.values()])

    async def go_on(self) -> None:
        """Begins anew what was given up or has failed, and watches the servers again."""
        await self.submit([submitted.request for submitted in self._submitted.values() if submitted.has_failed])


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def too_slow(timeout_seconds: float) -> EngineError:
    """That a rollout took too long."""
    return EngineError(
        f"the servers did not sample a rollout within {timeout_seconds:g} s (`generate_timeout_seconds`)"
    )
