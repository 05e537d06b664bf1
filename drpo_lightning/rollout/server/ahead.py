"""Requests that are answered while nobody waits for them."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace
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
        return self.task.done() and not self.task.cancelled() and self.task.exception() is None


class RequestsAhead:
    """What a rank has submitted and not taken yet. To be used in the event loop alone.

    A failure of a request is kept until it is collected, or begun anew with other weights.

    Args:
        dispatcher: asks the servers.
        timeout_seconds: how long `collect` waits.
    """

    def __init__(self, dispatcher: Dispatcher, timeout_seconds: float) -> None:
        self._dispatcher = dispatcher
        self._timeout_seconds = timeout_seconds
        self._weights_version = 0
        self._submitted: dict[int, _Submitted] = {}
        self._watcher: asyncio.Task[None] | None = None

    async def submit(self, requests: Sequence[Request]) -> None:
        """Begins with requests; see `RolloutEngine.submit`."""
        for request in requests:
            task = asyncio.create_task(self._completions(request, self._weights_version))
            self._submitted[request.number] = _Submitted(request, task)
        if requests and self._watcher is None:
            self._watcher = asyncio.create_task(self._dispatcher.watch())

    async def _completions(self, request: Request, weights_version: int) -> list[Completion]:
        completions = await self._dispatcher.answer(request, is_awaited=False)
        return [replace(completion, weights_version=weights_version) for completion in completions]

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
        """Gives up what is in flight, until `begin_anew`. What has been answered stays."""
        tasks: list[asyncio.Task[Any]] = [submitted.task for submitted in self._submitted.values()]
        if self._watcher is not None:
            tasks.append(self._watcher)
            self._watcher = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def begin_anew(self, weights_version: int) -> None:
        """Begins again with what has no answer.

        Args:
            weights_version: number of the weights that the servers have now.
        """
        self._weights_version = weights_version
        await self.submit([submitted.request for submitted in self._submitted.values() if not submitted.is_answered])


def too_slow(timeout_seconds: float) -> EngineError:
    """That a rollout took too long."""
    return EngineError(
        f"the servers did not sample a rollout within {timeout_seconds:g} s (`generate_timeout_seconds`)"
    )
