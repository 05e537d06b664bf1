"""Rollouts by vLLM servers, on this machine or others."""

import uuid
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from drpo_lightning.addresses import checked_url, is_loopback, key_from_environment
from drpo_lightning.batch import Completion, Sampling
from drpo_lightning.rollout.engine import InFlight, Request, RolloutEngine
from drpo_lightning.rollout.ranks import FAILURES, Ranks, attempt
from drpo_lightning.rollout.server.client import ServerInfo
from drpo_lightning.rollout.server.fleet import Fleet
from drpo_lightning.rollout.weights import WeightStream

TIMEOUTS = ("start_timeout_seconds", "generate_timeout_seconds", "sync_timeout_seconds", "stall_timeout_seconds")
T = TypeVar("T")
LEAST_WAIT_SECONDS = 7200.0
"""What the ranks wait for each other at least."""


class VLLMServerEngine(RolloutEngine):
    """Samples with vLLM servers that somebody else has started, as `drpo serve` does; see docs/deployment.md.

    Each of them may be many processes, by vLLM's own tensor or data parallelism. Every rank asks for the completions of
    its own prompts, of the server that is least busy. The first rank sends the weights to all servers, in the way that
    each was started for: `nccl`, between GPUs, or `drpo_http`, in the body of requests.

    A server that dies, hangs or answers with anything but completions of the newest weights is lost: its requests are
    asked again at the others, and it is left alone until the next sync, at which it gets the weights like all if it can
    be reached. When none is left, that is a failure of the engine; it is started again, up to `max_restarts` times in a
    row, which here means to wait for one of the servers.

    With `data.max_staleness` the servers sample while the trainer trains, each rank's requests by a thread of its own.
    What they have not answered when they get new weights goes on with those: its tokens so far stay, all that is cached
    of it is thrown away. With `data.in_flight: drop` every rank gives it up before, and asks it anew afterwards.

    Nobody but the trainer may use the servers. The trainer pauses them and replaces their weights through vLLM's
    development endpoints, which vLLM's API key does not guard; with that of `drpo serve` it does. See SECURITY.md.

    vLLM need not be installed beside the trainer.

    Args:
        urls: of the servers, as `http://127.0.0.1:8000`, without `/v1`.
        api_key_env: environment variable that holds the servers' API key, sent with every request. The key itself
            stands in no configuration, log or error.
        trusted_network: confirms that the servers are on a private network, or behind a proxy that authenticates.
            Without it every address must be of this machine.
        max_concurrency: most prompts that all ranks together ask of one server at a time.
        max_retries: how often one prompt is asked again when a server has failed.
        start_timeout_seconds: how long to wait for the servers: at first for each of them, after a failure for one.
        generate_timeout_seconds: how long they may take to sample one rollout.
        stall_timeout_seconds: how long a server with requests may compute nothing before it is lost.
        sync_timeout_seconds: how long a server may take for each step of a sync, one of which is a bucket of weights.
        max_restarts: see above; 0 ends the run when no server is left.

    Raises:
        ValueError: if a setting is out of range, or an address is not of this machine and not confirmed.
        SettingError: if the environment variable is not set, or holds no key.
    """

    is_shared = True
    context_setting = "`--max-model-len` of each `drpo serve`"

    def __init__(
        self,
        urls: list[str],
        api_key_env: str | None = None,
        trusted_network: bool = False,
        max_concurrency: int = 64,
        max_retries: int = 3,
        start_timeout_seconds: float = 600.0,
        generate_timeout_seconds: float = 1800.0,
        stall_timeout_seconds: float = 300.0,
        sync_timeout_seconds: float = 300.0,
        max_restarts: int = 3,
    ) -> None:
        super().__init__()
        for name in (*TIMEOUTS, "max_concurrency"):
            if not (value := locals()[name]) > 0:
                raise ValueError(f"`{name}` must be positive, got {value}")
        for name in ("max_retries", "max_restarts"):
            if (value := locals()[name]) < 0:
                raise ValueError(f"`{name}` must not be negative, got {value}")
        self.urls = _checked_urls(urls, trusted_network=trusted_network)
        self.api_key_env = api_key_env
        self.max_concurrency = max_concurrency
        self.max_retries = max_retries
        self.start_timeout_seconds = start_timeout_seconds
        self.generate_timeout_seconds = generate_timeout_seconds
        self.stall_timeout_seconds = stall_timeout_seconds
        self.sync_timeout_seconds = sync_timeout_seconds
        self.max_restarts = max_restarts
        self.timeout_seconds = max(start_timeout_seconds, generate_timeout_seconds, sync_timeout_seconds)
        self.num_lost_servers = 0
        """Times that this rank has lost a server."""
        self.num_retried_requests = 0
        """Times that this rank has asked for the completions of a prompt again."""
        key_from_environment("api_key_env", api_key_env)
        self._ranks = Ranks(max(LEAST_WAIT_SECONDS, 2 * self.timeout_seconds))
        self._fleet: Fleet | None = None
        self._was_started = False
        self._run_name = ""
        self._num_syncs = 0
        self._in_flight: InFlight = "drop"

    def check_available(self) -> None:
        """Nothing is needed here."""

    def describe(self) -> str:
        """Where the servers are."""
        return f"{type(self).__name__} with {len(self.urls)} server(s): {', '.join(self.urls)}"

    @property
    def is_started(self) -> bool:
        """True between `start` and `close`."""
        return self._fleet is not None

    @property
    def can_sleep(self) -> bool:
        """False: the servers' memory is not the trainer's."""
        return False

    @property
    def statistics(self) -> dict[str, float]:
        """`servers` with the newest weights, as this rank sees them, `lost_servers` and `retried_requests` so far."""
        return {
            "servers": 0 if self._fleet is None else len(self._fleet.current),
            "lost_servers": self.num_lost_servers,
            "retried_requests": self.num_retried_requests,
        }

    def start(
        self,
        model: str,  # noqa: ARG002 - the servers were started with it
        *,
        device: torch.device,
        num_ranks: int,
        seed: int,  # noqa: ARG002 - and each with a seed of its own
        trust_remote_code: bool = False,  # noqa: ARG002
        adapter_rank: int | None = None,  # noqa: ARG002
    ) -> None:
        """Waits for the servers and checks how they are set. Collective over all ranks."""
        self.check_sleep()
        key = key_from_environment("api_key_env", self.api_key_env)
        self._fleet = fleet = Fleet(
            self.urls,
            {} if key is None else {"Authorization": f"Bearer {key}"},
            device=device,
            max_concurrency=max(1, self.max_concurrency // num_ranks),
            max_retries=self.max_retries,
            generate_timeout_seconds=self.generate_timeout_seconds,
            stall_timeout_seconds=self.stall_timeout_seconds,
            sync_timeout_seconds=self.sync_timeout_seconds,
        )
        self._ranks.join()

        def connect() -> tuple[ServerInfo, str]:
            to_all = not self._was_started
            info = fleet.connect(self.start_timeout_seconds, to_all=to_all, is_run_to_end=self.is_run_to_end)
            return info, uuid.uuid4().hex[:12]

        outcome = attempt(connect) if self._leads else None
        try:
            shared = self._ranks.share(outcome)
        except FAILURES:
            self._close_fleet()
            raise
        assert shared is not None
        info, self._run_name = shared
        self.context_tokens = info.context_tokens
        self.cache_block_tokens = info.cache_block_tokens
        self.dtype_name = info.dtype_name
        self._was_started = True

    @property
    def _leads(self) -> bool:
        return self._ranks.number == 0

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `RolloutEngine.load_weights`. Collective over all ranks: each takes the weights to their end."""
        fleet = self._started_fleet
        self._num_syncs += 1
        version = f"{self._run_name}-{self._num_syncs}"
        fleet.begin_sync(version, self.weights_version, self._in_flight)
        self._ranks.gather(None)  # no rank has requests in flight any more, or each knows the new label
        stream = WeightStream(weights)

        def send() -> list[str]:
            fleet.load_weights(stream, version, self.dtype_name, self._in_flight)
            return [server.failure for server in fleet.servers]

        outcome = attempt(send) if self._leads else []
        stream.drain()  # a failure of the source is each rank's own
        self._report()
        fleet.end_sync(version, self._ranks.share(outcome))

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        num_samples: int,
        stop_token_ids: Sequence[int],
        seeds: Sequence[int] | None = None,
        num_topk: int = 0,
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`. Collective over all ranks, of which one may have no prompts."""
        fleet = self._started_fleet
        settings = (sampling, num_samples, stop_token_ids)
        requests = [
            Request(number, ids, *settings, None if seeds is None else seeds[number], num_topk)
            for number, ids in enumerate(prompt_ids)
        ]
        return self._answered(lambda: fleet.generate(requests))

    def sample_ahead(self, in_flight: InFlight) -> None:
        """See `RolloutEngine.sample_ahead`."""
        self._in_flight = in_flight

    def submit(self, requests: Sequence[Request]) -> None:
        """See `RolloutEngine.submit`."""
        self._started_fleet.submit(requests)

    def collect(self, numbers: Sequence[int]) -> dict[int, list[Completion]]:
        """See `RolloutEngine.collect`. Collective over all ranks, of which one may ask for nothing."""
        fleet = self._started_fleet
        return self._answered(lambda: fleet.collect(numbers))

    def finished(self) -> dict[int, list[Completion]]:
        """See `RolloutEngine.finished`."""
        return self._started_fleet.finished()

    def _answered(self, ask: Callable[[], T]) -> T:
        """What the fleet answers this rank; a failure of any rank is raised on each."""
        outcome = attempt(ask)
        self._report()
        return self._ranks.agree(outcome)

    @property
    def _started_fleet(self) -> Fleet:
        assert self._fleet is not None, "the engine is not started"
        return self._fleet

    def _report(self) -> None:
        """Takes over the fleet's counts, and warns of what has become of servers."""
        report = self._started_fleet.report()
        self.num_lost_servers += report.num_lost
        self.num_retried_requests += report.num_retried
        for message in report.news:
            warnings.warn(message, RuntimeWarning, stacklevel=4)

    def _sleep(self) -> None: ...

    def _wake(self) -> None: ...

    def _close_fleet(self) -> None:
        fleet, self._fleet = self._fleet, None
        if fleet is not None:
            fleet.close()

    def abandon(self) -> None:
        """Closes the connections; `start` then waits for one server only."""
        self._close_fleet()

    def close(self) -> None:
        """Closes the connections. Not collective. The servers go on."""
        self._close_fleet()
        self._ranks.leave()
        self._was_started = False


def _checked_urls(urls: Sequence[str], *, trusted_network: bool) -> list[str]:
    """Addresses of servers, each once.

    Raises:
        ValueError: if there is none, one is no address, there twice, or leads to a network that is not confirmed.
    """
    checked = [checked_url("urls", url) for url in urls]
    if not checked or len(set(checked)) < len(checked):
        raise ValueError(f"`urls` must name at least one server, and each once, got {checked}")
    if not trusted_network and (elsewhere := [url for url in checked if not is_loopback(url)]):
        raise ValueError(
            f"`urls` has {elsewhere[0]}, which is not on this machine. Whoever reaches a rollout server can replace "
            "its weights: it must be on a private network, or behind a proxy that authenticates (see SECURITY.md). Set "
            "`trusted_network: true` to confirm that it is"
        )
    return checked
