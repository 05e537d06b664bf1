"""One rollout engine for all ranks of a machine."""

import contextlib
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from drpo_lightning.batch import Completion, Sampling
from drpo_lightning.rollout.engine import EngineError, RolloutEngine
from drpo_lightning.rollout.ranks import FAILURES, Failure, attempt
from drpo_lightning.rollout.weights import WeightStream
from drpo_lightning.rollout.wrapped import WrappedEngine

T = TypeVar("T")


class NodeEngine(WrappedEngine):
    """Shares one engine among the trainer's ranks of a machine: the first of them, the leader, has it.

    The prompts of all its ranks are generated in one call, and each rank gets the completions of its own prompts.
    The first `start` is collective over all ranks; all else but `close` over those of a machine, the ones with the same
    host name. What fails on the leader is raised on each of them. Alone on its machine a rank uses the engine as if it
    were its own.

    Args:
        engine: what the ranks share.
        timeout_seconds: how long the ranks of a machine may wait for each other, and so for the engine's start, for
            one rollout and for one sync. Longer than the engine's own time-outs, whose messages say more.

    Raises:
        ValueError: if `timeout_seconds` is not positive, or the engine is shared without it.
    """

    def __init__(self, engine: RolloutEngine, timeout_seconds: float = 7200.0) -> None:
        if not timeout_seconds > 0:
            raise ValueError(f"`timeout_seconds` must be positive, got {timeout_seconds}")
        if engine.is_shared:
            raise ValueError(f"`{type(engine).__name__}` is shared by all ranks already: use it without `NodeEngine`")
        super().__init__(engine)
        self.timeout_seconds = timeout_seconds
        self.dtype_name = engine.dtype_name
        self.max_restarts = engine.max_restarts
        self._group: dist.ProcessGroup | None = None
        self._knows_group = False
        self._can_sleep = False
        self._is_started = False

    @property
    def is_started(self) -> bool:
        """True between `start` and `close`, on every rank."""
        return self._is_started

    @property
    def can_sleep(self) -> bool:
        """True if the leader's engine can."""
        return self._can_sleep

    @property
    def _is_leader(self) -> bool:
        return self._group is None or self._group.rank() == 0

    @property
    def _num_ranks(self) -> int:
        """Ranks of this machine."""
        return 1 if self._group is None else self._group.size()

    def start(
        self,
        model: str,
        *,
        device: torch.device,
        num_ranks: int,
        seed: int,
        trust_remote_code: bool = False,
        adapter_rank: int | None = None,
    ) -> None:
        """Finds the ranks of each machine and starts the engine on the leader's device. Collective over all ranks."""
        if not self._knows_group:
            self._group = _ranks_of_this_machine(timedelta(seconds=self.timeout_seconds))
            self._knows_group = True

        def start() -> _Properties:
            self.engine.start(
                model,
                device=device,
                num_ranks=num_ranks,
                seed=seed,
                trust_remote_code=trust_remote_code,
                adapter_rank=adapter_rank,
            )
            return _Properties.of(self.engine)

        properties = self._share("start", self._attempt(self._for_each(start)))
        self.cache_block_tokens = properties.cache_block_tokens
        self.context_tokens = properties.context_tokens
        self.dtype_name = properties.dtype_name
        self.max_restarts = properties.max_restarts
        self._can_sleep = properties.can_sleep
        self._is_started = True

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
        """See `RolloutEngine.generate`. Collective over the ranks of a machine.

        Args:
            prompt_ids: token ids of each of this rank's prompts, of which it may have none.
            sampling: the same on each rank, as everything but prompts and seeds.
            num_samples: completions per prompt.
            stop_token_ids: tokens that end a completion.
            seeds: one seed per prompt.
            num_topk: how many of the most likely tokens at each place are returned.

        Raises:
            EngineError: on each rank, if the engine fails or the ranks do not ask for the same.
        """
        settings = {
            "sampling": sampling,
            "num_samples": num_samples,
            "stop_token_ids": list(stop_token_ids),
            "num_topk": num_topk,
            "seeded": seeds is not None,
        }
        requests = self._gather("generate", _Request(prompt_ids, seeds or (), settings))
        return self._share("generate", self._attempt(lambda: self._generate(requests)))

    def _generate(self, requests: list["_Request"]) -> list[list[list[Completion]]]:
        """The groups of each rank's prompts, from one call of the engine."""
        settings = dict(requests[0].settings)
        for number, request in enumerate(requests):
            if request.settings != settings:
                raise EngineError(
                    f"the ranks of a machine must sample in the same way: the first asks for {settings}, number "
                    f"{number} after it for {request.settings}"
                )
        prompt_ids = [ids for request in requests for ids in request.prompt_ids]
        seeds = [seed for request in requests for seed in request.seeds] if settings.pop("seeded") else None
        answered = self.engine.generate(prompt_ids, **settings, seeds=seeds)
        if len(answered) != len(prompt_ids):
            raise EngineError(f"the engine returned completions of {len(answered)} prompts for {len(prompt_ids)}")
        groups = iter(answered)
        return [list(islice(groups, len(request.prompt_ids))) for request in requests]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `RolloutEngine.load_weights`. Collective over the ranks of a machine.

        Every rank takes the weights to their end, also when the engine has failed, since gathering a sharded one is
        collective; only the leader's go to the engine.
        """
        self._load("load_weights", self.engine.load_weights, weights)

    def load_adapter(self, config: Mapping[str, Any], weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `RolloutEngine.load_adapter`. Collective over the ranks of a machine, as `load_weights`."""
        self._load("load_adapter", partial(self.engine.load_adapter, config), weights)

    def _load(
        self, method: str, load: Callable[[Iterable[tuple[str, Tensor]]], None], weights: Iterable[tuple[str, Tensor]]
    ) -> None:
        stream = WeightStream(weights)
        parts = self._attempt(self._for_each(partial(load, stream)))
        stream.drain()  # a failure of the source is each rank's own, not the leader's
        self._share(method, parts)

    def _sleep(self) -> None:
        self._share("sleep", self._attempt(self._for_each(self.engine.sleep)))

    def _wake(self) -> None:
        self._share("wake", self._attempt(self._for_each(self.engine.wake)))

    def close(self) -> None:
        """Ends the engine. Not collective."""
        self.abandon()
        self._group, self._knows_group = None, False

    def abandon(self) -> None:
        """Ends the engine; to start it again is up to the ranks of its machine alone. Not collective."""
        self._is_started = False
        self.engine.close()

    def _for_each(self, compute: Callable[[], T]) -> Callable[[], list[T]]:
        """The same for each rank of the machine, computed once."""
        return lambda: [compute()] * self._num_ranks

    def _attempt(self, compute: Callable[[], Sequence[T]]) -> "Sequence[T | Failure]":
        """What `compute` gives for each rank of the machine, or its error for each; nothing but on the leader."""
        if not self._is_leader:
            return ()
        outcome = attempt(compute)
        return [outcome] * self._num_ranks if isinstance(outcome, FAILURES) else outcome

    def _share(self, method: str, parts: "Sequence[T | Failure]") -> T:
        """This rank's one of the leader's parts, raised if it is an error."""
        part: Any = parts[0] if self._is_leader else None
        if self._group is not None:
            received: list[Any] = [None]
            sent = [None, *parts[1:]] if self._is_leader else None
            with self._waiting(method):
                dist.scatter_object_list(received, sent, group=self._group, group_src=0)
            part = part if self._is_leader else received[0]
        if isinstance(part, FAILURES):
            raise part
        return part  # type: ignore[no-any-return]

    def _gather(self, method: str, item: T) -> list[T]:
        """The items of all ranks of the machine, on the leader."""
        if self._group is None:
            return [item]
        items: list[Any] | None = [None] * self._num_ranks if self._is_leader else None
        with self._waiting(method):
            dist.gather_object(item, items, group=self._group, group_dst=0)
        return items or []

    @contextlib.contextmanager
    def _waiting(self, method: str) -> Iterator[None]:
        """Says what was waited for if another rank is gone or too late."""
        try:
            yield
        except RuntimeError as error:
            raise EngineError(
                f"in `{method}` another rank of this machine ended, or did not come within {self.timeout_seconds:g} s "
                f"(`timeout_seconds` of `NodeEngine`); its own output says why: {error}"
            ) from error


class _Properties(NamedTuple):
    """What is known of an engine once it has started."""

    cache_block_tokens: int
    context_tokens: int
    dtype_name: str
    max_restarts: int
    can_sleep: bool

    @classmethod
    def of(cls, engine: RolloutEngine) -> "_Properties":
        return cls(*(getattr(engine, name) for name in cls._fields))


class _Request(NamedTuple):
    """What one rank asks `generate` for."""

    prompt_ids: Sequence[Sequence[int]]
    seeds: Sequence[int]
    settings: dict[str, Any]


def _ranks_of_this_machine(timeout: timedelta) -> dist.ProcessGroup | None:
    """The ranks with this one's host name, in a group for objects on the host; None if there is no other."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    hosts = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    groups = {
        host: dist.new_group([rank for rank, other in enumerate(hosts) if other == host], timeout, backend="gloo")
        for host in dict.fromkeys(hosts)
    }
    group = groups[hosts[dist.get_rank()]]
    return group if group.size() > 1 else None
