"""A prompt goes to the least busy of many servers, and to another if that is lost."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from drpo_lightning.batch import Completion
from drpo_lightning.errors import SettingError
from drpo_lightning.rollout.engine import EngineError, Request
from drpo_lightning.rollout.server.client import ServerError, ServerGoneError, VLLMServer
from drpo_lightning.rollout.server.messages import generate_message

WATCH_SECONDS = 5.0
"""Between two looks at the progress of a server."""


class Report(NamedTuple):
    """What has happened since the last one.

    Attributes:
        num_lost: times that a server was lost.
        num_retried: times that a request was asked again.
        news: what has become of servers, in words.
    """

    num_lost: int
    num_retried: int
    news: list[str]


class Dispatcher:
    """Spreads one rank's requests over the servers. Its coroutines run in one event loop.

    A server that fails is lost: it is asked for nothing until it has got weights again, at the next sync.

    Args:
        servers: all of them.
        max_concurrency: most requests that one server has at the same time.
        max_retries: times that a request is asked again.
        stall_timeout_seconds: how long a server that has requests may compute nothing.
        on_loss: told of a server that is lost.

    Attributes:
        news: for the next report.
    """

    def __init__(
        self,
        servers: Sequence[VLLMServer],
        *,
        max_concurrency: int,
        max_retries: int,
        stall_timeout_seconds: float,
        on_loss: Callable[[VLLMServer], object],
    ) -> None:
        self.news: list[str] = []
        self._servers = servers
        self._max_concurrency = max_concurrency
        self._max_retries = max_retries
        self._stall_timeout_seconds = stall_timeout_seconds
        self._on_loss = on_loss
        self._num_lost = 0
        self._num_retried = 0
        self._changed = asyncio.Condition()
        self._num_awaited_in_queue = 0
        self._is_syncing = False

    @property
    def current(self) -> list[VLLMServer]:
        """Those that have the newest weights and may be asked for samples."""
        return [server for server in self._servers if server.is_current]

    def lose(self, server: VLLMServer, failure: object) -> None:
        """Leaves a server alone until the next sync."""
        if not server.failure:
            self._num_lost += 1
            self.news.append(f"{failure}. The server is left alone until the next sync, and others are asked instead")
        self._on_loss(server)
        server.leave(str(failure) or repr(failure))

    def all_are_lost(self) -> EngineError:
        """That no server is left."""
        reasons = "; ".join(dict.fromkeys(server.failure for server in self._servers))
        return EngineError(f"no rollout server is left: {reasons}. Start them again with `drpo serve`")

    async def begin_sync(self) -> None:
        """Sends no request to a server until `end_sync`; those that servers have may stay with them."""
        self._is_syncing = True

    async def end_sync(self) -> None:
        """Sends requests to servers again."""
        async with self._changed:
            self._is_syncing = False
            self._changed.notify_all()

    async def report(self) -> Report:
        """What has happened since the last one."""
        report = Report(self._num_lost, self._num_retried, self.news)
        self._num_lost, self._num_retried, self.news = 0, 0, []
        return report

    async def answer(self, request: Request, *, is_awaited: bool) -> list[Completion]:
        """The completions of one prompt, by whichever server gives them.

        Args:
            request: what is asked.
            is_awaited: whether it goes before those that are not.

        Raises:
            EngineError: if no server is left, or they fail again and again.
            SettingError: if one refuses it.
        """
        message = generate_message(
            request.prompt_ids,
            request.sampling,
            num_samples=request.num_samples,
            stop_token_ids=request.stop_token_ids,
            seed=request.seed,
            num_topk=request.num_topk,
        )
        failure = ""
        for number in range(self._max_retries + 1):
            server = await self._least_busy(is_awaited=is_awaited)
            self._num_retried += number > 0
            version = server.version
            task = asyncio.ensure_future(server.generate(message, request.num_topk, version))
            server.tasks.add(task)
            try:
                await asyncio.wait({task})
            finally:
                task.cancel()
                server.tasks.discard(task)
                async with self._changed:
                    self._changed.notify_all()
                await asyncio.wait({task})  # until its connection is closed
            if not task.cancelled():
                error = task.exception()
                if error is None:
                    return task.result()
                if not isinstance(error, ServerError):
                    raise error
                await self._examine(server, version, error)
                failure = str(error)
            else:
                failure = server.failure
        raise EngineError(f"a request failed {self._max_retries + 1} times (`max_retries`); at last: {failure}")

    async def _least_busy(self, *, is_awaited: bool) -> VLLMServer:
        """A server with room for a request; waits for one, and lets those go first that somebody waits for."""

        def free() -> VLLMServer | None:
            if self._is_syncing or (self._num_awaited_in_queue and not is_awaited):
                return None
            with_room = (server for server in self.current if len(server.tasks) < self._max_concurrency)
            return min(with_room, key=lambda server: len(server.tasks), default=None)

        async with self._changed:
            self._num_awaited_in_queue += is_awaited
            try:
                await self._changed.wait_for(lambda: free() is not None or not (self._is_syncing or self.current))
            finally:
                self._num_awaited_in_queue -= is_awaited
                if is_awaited:
                    self._changed.notify_all()
            if (server := free()) is None:
                raise self.all_are_lost()
            return server

    async def _examine(self, server: VLLMServer, version: str, failure: ServerError) -> None:
        """After a failed request, asked when it had some weights: a server that is not well, or has others, is lost.

        Not if they are later ones: it may be in a sync, of which this rank does not know the end yet.
        """
        try:
            await server.check(version)
        except (ServerError, SettingError):
            self.lose(server, failure)

    async def watch(self) -> None:
        """Loses servers that hang or are gone, until none is left that has the newest weights, or it is cancelled."""
        await asyncio.gather(*(self._watch(server) for server in self.current))

    async def _watch(self, server: VLLMServer) -> None:
        """Loses a server that has requests and computes nothing, or takes no more of them.

        One that is told to end closes its address, and may leave its requests open without ever answering them.
        """
        progress, since = -1.0, time.monotonic()
        while server.is_current:
            await asyncio.sleep(min(WATCH_SECONDS, self._stall_timeout_seconds / 4))
            try:
                found = await server.progress()
            except ServerGoneError as failure:
                self.lose(server, failure)
                return
            except (ServerError, SettingError):
                found = progress  # it may only be busy
            if found != progress or not server.tasks:
                progress, since = found, time.monotonic()
            elif time.monotonic() - since > self._stall_timeout_seconds:
                seconds = self._stall_timeout_seconds
                self.lose(server, f"{server} made no progress for {seconds:g} s (`stall_timeout_seconds`)")
