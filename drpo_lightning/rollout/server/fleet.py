"""Many vLLM servers as one."""

import asyncio
import atexit
import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import aiohttp
import torch
from torch import Tensor

from drpo_lightning.batch import Completion
from drpo_lightning.errors import SettingError
from drpo_lightning.rollout.engine import EngineError, InFlight, Request
from drpo_lightning.rollout.server.ahead import RequestsAhead, too_slow
from drpo_lightning.rollout.server.client import ServerError, ServerInfo, VLLMServer
from drpo_lightning.rollout.server.dispatch import Dispatcher, Report
from drpo_lightning.rollout.server.loop import BackgroundLoop
from drpo_lightning.rollout.server.nccl import NCCLSender
from drpo_lightning.rollout.server.sent import SentWeights
from drpo_lightning.rollout.server.weights import NCCL_BACKEND, Bucket, buckets, update_message

LOG = logging.getLogger(__name__)
POLL_SECONDS = 1.0
REPORT_SECONDS = 30.0
"""Between two lines that say which servers are waited for."""


class Fleet:
    """The servers, as seen by one rank.

    A server that fails is lost: it is asked for nothing until it has got weights again, at the next sync.

    Args:
        urls: of the servers.
        headers: of every request.
        device: the trainer's.
        max_concurrency: most requests that one server has at the same time.
        max_retries: times that a request is asked again.
        generate_timeout_seconds: for all requests of one rollout.
        stall_timeout_seconds: how long a server that has requests may compute nothing.
        sync_timeout_seconds: for each step of a sync.

    Attributes:
        servers: in the order of `urls`.
    """

    def __init__(
        self,
        urls: Sequence[str],
        headers: dict[str, str],
        *,
        device: torch.device,
        max_concurrency: int,
        max_retries: int,
        generate_timeout_seconds: float,
        stall_timeout_seconds: float,
        sync_timeout_seconds: float,
    ) -> None:
        self._device = device
        self._generate_timeout_seconds = generate_timeout_seconds
        self._sync_timeout_seconds = sync_timeout_seconds
        self._senders: dict[VLLMServer, NCCLSender] = {}
        self._loop = BackgroundLoop()
        self._session = self._loop.run(_open_session())
        self._sent = SentWeights()
        self.servers = [VLLMServer(self._session, url, headers, self._sent) for url in urls]
        self._dispatcher = Dispatcher(
            self.servers,
            max_concurrency=max_concurrency,
            max_retries=max_retries,
            stall_timeout_seconds=stall_timeout_seconds,
            on_loss=self._drop_sender,
        )
        self._ahead = RequestsAhead(self._dispatcher, generate_timeout_seconds)
        atexit.register(self.close)  # a program that forgets to would end with complaints about what is open

    @property
    def current(self) -> list[VLLMServer]:
        """Those that have the newest weights and may be asked for samples."""
        return self._dispatcher.current

    def close(self) -> None:
        """Closes all connections. The servers go on, and wait for a trainer."""
        atexit.unregister(self.close)
        for sender in self._senders.values():
            sender.close()
        self._loop.run(self._ahead.give_up())
        self._loop.run(self._session.close())
        self._loop.close()

    def connect(self, timeout_seconds: float, *, to_all: bool, is_run_to_end: Callable[[], bool] = bool) -> ServerInfo:
        """Waits until servers are ready, and says what holds for all: the smallest context, the largest block.

        Logs which are not ready and why, at once and every `REPORT_SECONDS`.

        Args:
            timeout_seconds: how long.
            to_all: waits for each of them, and refuses the wrong settings of any; or else for one of them.
            is_run_to_end: see `RolloutEngine`.

        Raises:
            EngineError: if it takes too long.
            SettingError: if a server is set wrongly, or they differ in precision, or not in their seeds.
            WaitEnded: if the run is to end before.
        """
        infos = self._loop.run(self._connect(timeout_seconds, to_all=to_all), is_run_to_end=is_run_to_end)
        if len({info.dtype_name for info in infos}) > 1:
            raise SettingError(f"the servers must have weights of one precision, got {[i.dtype_name for i in infos]}")
        if len({info.seed for info in infos}) < len(infos):
            raise SettingError(
                f"the servers must draw different random numbers, got the seeds {[info.seed for info in infos]}; set "
                "`--seed` of each, or start them with `drpo serve`, which draws one"
            )
        return infos[0]._replace(
            context_tokens=min(info.context_tokens for info in infos),
            cache_block_tokens=max(info.cache_block_tokens for info in infos),
        )

    async def _connect(self, timeout_seconds: float, *, to_all: bool) -> list[ServerInfo]:
        next_report = time.monotonic()
        deadline = next_report + timeout_seconds
        while True:
            infos, failures = _parted(await _outcomes(server.info(self._device) for server in self.servers))
            if to_all and (wrong := [failure for failure in failures if isinstance(failure, SettingError)]):
                raise wrong[0]
            if infos and not (to_all and failures):
                return infos
            now = time.monotonic()
            if now > deadline:
                raise EngineError(
                    f"{len(failures)} of {len(self.servers)} rollout servers were not ready within "
                    f"{timeout_seconds:g} s (`start_timeout_seconds`): {failures[0]}. Start them with `drpo serve`, or "
                    "correct `urls`"
                )
            if now >= next_report:
                next_report = now + REPORT_SECONDS
                reasons = "; ".join(map(str, failures))
                LOG.warning("Waiting for rollout servers, at most %.0f s: %s", deadline - now, reasons)
            await asyncio.sleep(POLL_SECONDS)

    def begin_sync(self, version: str, weights_version: int, in_flight: InFlight) -> None:
        """Makes ready for a sync: asks servers for nothing new, and of what they have gives up all or nothing.

        Args:
            version: label that the servers give to what they sample after it; later than those of earlier syncs.
            weights_version: number of the weights, see `RolloutEngine`.
            in_flight: what becomes of this rank's requests, see `RolloutEngine.sample_ahead`.
        """
        self._loop.run(self._begin_sync(version, weights_version, in_flight))

    async def _begin_sync(self, version: str, weights_version: int, in_flight: InFlight) -> None:
        self._sent.announce(version, weights_version)
        await self._dispatcher.begin_sync()
        await (self._ahead.hold() if in_flight == "continue" else self._ahead.give_up())

    def load_weights(
        self, weights: Iterable[tuple[str, Tensor]], version: str, dtype_name: str, in_flight: InFlight
    ) -> None:
        """Sends weights to every server that can be reached, also to those that were lost.

        A server that was lost, or has had none of this trainer's weights, ends its requests first: nobody waits for
        them, be they of this trainer or of one that was killed.

        Args:
            weights: name and tensor of the whole state dict.
            version: label that the servers give to what they sample from then on.
            dtype_name: precision that each server must have.
            in_flight: what becomes of the requests of all ranks.

        Raises:
            EngineError: if no server has them at the end.
        """
        seconds = self._sync_timeout_seconds
        lost_before = [server for server in self.servers if server.failure]
        kept = set(self.current) if in_flight == "continue" else set()
        for server in self.servers:
            server.version = ""
        ready = self._on_each(
            self.servers, lambda server: self._prepare(server, dtype_name, keeps_requests=server in kept)
        )
        by_http = [server for server in ready if server not in self._senders]
        for bucket in buckets(weights, self._device if self._senders else torch.device("cpu")):
            content = update_message(bucket, with_content=True) if by_http else b""
            ready = self._on_each(ready, partial(self._update, bucket=bucket, content=content))
        for server in self._on_each(ready, lambda server: server.finish_update(version, seconds)):
            server.accept(version)
        for server in lost_before:
            if server.is_current:
                self._dispatcher.news.append(f"{server} is back, and has the current weights")
            else:
                LOG.warning("Still without a server: %s", server.failure)

    def end_sync(self, version: str, failures: Sequence[str]) -> None:
        """Goes on with requests; begins anew those that were given up, have failed, or were at a server that is lost.

        Args:
            version: label of the weights that the servers have now.
            failures: why each server is lost, as the rank that has sent the weights found it; empty for the others.
        """
        self._loop.run(self._end_sync(version, failures))

    async def _end_sync(self, version: str, failures: Sequence[str]) -> None:
        for server, failure in zip(self.servers, failures, strict=True):
            if failure:
                server.leave(failure)
            else:
                server.accept(version)
        await self._dispatcher.end_sync()
        await self._ahead.go_on()

    def _on_each(
        self, servers: Sequence[VLLMServer], step: Callable[[VLLMServer], Awaitable[None]]
    ) -> list[VLLMServer]:
        """Takes a step of a sync with servers at the same time; those that it has worked with."""
        outcomes = self._loop.run(_outcomes(step(server) for server in servers))
        for server, outcome in zip(servers, outcomes, strict=True):
            if outcome is not None:
                self._dispatcher.lose(server, outcome)
        done = [server for server, outcome in zip(servers, outcomes, strict=True) if outcome is None]
        if not done:
            raise self._dispatcher.all_are_lost()
        return done

    async def _prepare(self, server: VLLMServer, dtype_name: str, *, keeps_requests: bool) -> None:
        """Looks at a server as if for the first time, since it may have been started again, and begins an update."""
        info = await server.info(self._device)
        if info.dtype_name != dtype_name:
            raise SettingError(f"{server} has weights in {info.dtype_name} instead of {dtype_name}")
        if info.backend == NCCL_BACKEND:
            await self._join(server, info)
        await server.begin_update(self._sync_timeout_seconds, keeps_requests=keeps_requests)

    async def _join(self, server: VLLMServer, info: ServerInfo) -> None:
        """Forms an NCCL group with the workers of a server, unless there is one."""
        if server in self._senders and self._senders[server].instance == info.instance:
            return
        self._drop_sender(server)
        await server.ask("POST", "/shutdown_weight_transfer_engine")  # the group of an earlier trainer
        sender = NCCLSender(self._device, info.num_workers, info.instance, self._sync_timeout_seconds)
        self._senders[server] = sender

        async def introduce() -> None:
            init_info = await asyncio.to_thread(sender.init_info)
            seconds = self._sync_timeout_seconds
            await server.ask("POST", "/init_weight_transfer_engine", {"init_info": init_info}, timeout_seconds=seconds)

        await asyncio.gather(_by_nccl(server, sender.join), introduce())

    async def _update(self, server: VLLMServer, bucket: Bucket, content: bytes) -> None:
        """Sends a bucket in the body of the request, or announces it and sends it by NCCL at the same time."""
        if (sender := self._senders.get(server)) is None:
            await server.update(content, self._sync_timeout_seconds)
            return
        announced = server.update(update_message(bucket, with_content=False), self._sync_timeout_seconds)
        await asyncio.gather(announced, _by_nccl(server, sender.send, bucket))

    def _drop_sender(self, server: VLLMServer) -> None:
        if (sender := self._senders.pop(server, None)) is not None:
            sender.close()

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """The completions of each request. They go before those of `submit` that no server has yet.

        Raises:
            EngineError: if no server is left, it takes too long, or a request fails again and again.
            SettingError: if a server refuses a request.
        """
        return self._loop.run(self._generate(requests))

    async def _generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        answers = [asyncio.ensure_future(self._dispatcher.answer(request, is_awaited=True)) for request in requests]
        watcher = asyncio.ensure_future(self._dispatcher.watch())
        try:
            async with asyncio.timeout(self._generate_timeout_seconds):
                groups = await asyncio.gather(*answers)
        except TimeoutError as error:
            raise too_slow(self._generate_timeout_seconds) from error
        finally:
            for task in (*answers, watcher):
                task.cancel()
            await asyncio.gather(*answers, watcher, return_exceptions=True)
        # They cannot outlive their weights.
        return [[replace(completion, weights_version=None) for completion in group] for group in groups]

    def submit(self, requests: Sequence[Request]) -> None:
        """See `RolloutEngine.submit`. Raises nothing: what fails is told by `collect`."""
        self._loop.run(self._ahead.submit(requests))

    def collect(self, numbers: Sequence[int]) -> dict[int, list[Completion]]:
        """See `RolloutEngine.collect`; raises what `generate` does."""
        return self._loop.run(self._ahead.collect(numbers))

    def finished(self) -> dict[int, list[Completion]]:
        """See `RolloutEngine.finished`. Raises nothing."""
        return self._loop.run(self._ahead.finished())

    def report(self) -> Report:
        """What has happened since the last one."""
        return self._loop.run(self._dispatcher.report())


async def _open_session() -> aiohttp.ClientSession:
    """A connection for each request; certificates are checked, and proxies not used."""
    # vLLM closes a connection after an error without saying so: the next request on it would be lost.
    connector = aiohttp.TCPConnector(limit=0, force_close=True, ssl=ssl.create_default_context())
    return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())


async def _by_nccl(server: VLLMServer, step: Callable[..., None], *args: Any) -> None:  # noqa: ANN401
    """Takes a step of a transfer in a thread of its own, since it waits for the server's workers."""
    try:
        await asyncio.to_thread(step, *args)
    except RuntimeError as error:
        raise ServerError(f"{server} could not be sent weights by NCCL: {error}") from error


async def _outcomes(steps: Iterable[Awaitable[Any]]) -> list[Any]:
    """The result of each, or how it failed; what is no failure of a server is raised."""
    outcomes = await asyncio.gather(*steps, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, ServerError | SettingError):
            raise outcome
    return outcomes


def _parted(outcomes: Sequence[Any]) -> tuple[list[ServerInfo], list[Exception]]:
    """What servers have said of themselves, and how others have failed."""
    failures = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
    return [outcome for outcome in outcomes if isinstance(outcome, ServerInfo)], failures
