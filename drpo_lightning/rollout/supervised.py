"""Restarts an engine that fails: with the trainer's weights, and on all ranks together."""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from drpo_lightning.batch import Completion, Sampling
from drpo_lightning.rollout.engine import EngineError, InFlight, Request, RolloutEngine
from drpo_lightning.rollout.ranks import Ranks
from drpo_lightning.rollout.weights import WeightStream
from drpo_lightning.rollout.wrapped import WrappedEngine

T = TypeVar("T")
LEAST_WAIT_SECONDS = 7200.0
"""What the ranks wait for each other at least: in it one of them may start an engine, or sample a rollout."""


class SupervisedEngine(WrappedEngine):
    """An engine that is ended, started again, given the trainer's weights and asked again when it fails.

    `start`, `load_weights`, `load_adapter`, `generate` and `collect` are collective over all ranks. After each of them
    the ranks tell each other whose engine has failed. Those restart theirs while all take part in gathering the
    weights, since a sharded one has a part on each rank; the others' engines are left alone and keep what they have
    sampled. A failure of the other methods is noticed at the next of those. What was submitted to an engine that has
    failed, and not collected yet, is submitted again.

    After `max_restarts` of the engine, counted in a row and of any rank, the next failure is raised on every rank; so
    is one of the first start. Seeded requests give the same completions again.

    Args:
        engine: what is supervised; the same on each rank.
    """

    def __init__(self, engine: RolloutEngine) -> None:
        super().__init__(engine)
        self.timeout_seconds = max(LEAST_WAIT_SECONDS, 2 * engine.timeout_seconds)
        self._ranks = Ranks(self.timeout_seconds)
        self._start: Callable[[], None] = engine.close
        self._load: Callable[[Iterable[tuple[str, Tensor]]], None] = engine.load_weights
        self._weights: Iterable[tuple[str, Tensor]] = ()
        self._failure: EngineError | None = None
        """Of this rank's engine, which is of no use until it is started again."""
        self._num_in_a_row = 0
        self._submitted: dict[int, Request] = {}
        """What the engine was asked for and has not handed over, by number."""

    @property
    def is_started(self) -> bool:
        """True between `start` and `close`, also if the engine has failed since."""
        return self._failure is not None or self.engine.is_started

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
        """See `RolloutEngine.start`. A failure on one rank is raised on each."""

        def start() -> None:
            self.engine.start(
                model,
                device=device,
                num_ranks=num_ranks,
                seed=seed + self.engine.num_restarts * num_ranks,  # or it would draw what it drew at the beginning
                trust_remote_code=trust_remote_code,
                adapter_rank=adapter_rank,
            )

        self.engine.is_run_to_end = self.is_run_to_end
        self._ranks.join()
        self._start = start
        self._attempt(start)
        if any(failures := self._failures()):
            self._give_up(failures)
        self.cache_block_tokens = self.engine.cache_block_tokens
        self.context_tokens = self.engine.context_tokens
        self.dtype_name = self.engine.dtype_name

    def sample_ahead(self, in_flight: InFlight) -> None:
        """See `RolloutEngine.sample_ahead`."""
        self.engine.sample_ahead(in_flight)
        self.sleep_mode = self.engine.sleep_mode

    def submit(self, requests: Sequence[Request]) -> None:
        """See `RolloutEngine.submit`."""
        self._submitted |= {request.number: request for request in requests}
        self._attempt(lambda: self.engine.submit(requests))

    def collect(self, numbers: Sequence[int]) -> dict[int, list[Completion]]:
        """See `RolloutEngine.collect`."""
        groups = self._until_well(lambda: self.engine.collect(numbers))
        self._forget(groups)
        return groups

    def finished(self) -> dict[int, list[Completion]]:
        """See `RolloutEngine.finished`; nothing of an engine that has failed, which is noticed later."""
        groups = self._attempt(self.engine.finished) or {}
        self._forget(groups)
        return groups

    def _forget(self, groups: Iterable[int]) -> None:
        for number in groups:
            del self._submitted[number]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `RolloutEngine.load_weights`.

        Args:
            weights: name and tensor; iterated over once more for every restart until others are loaded.
        """
        self._refresh(self.engine.load_weights, weights)

    def load_adapter(self, config: Mapping[str, Any], weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `RolloutEngine.load_adapter`; iterates over the weights as `load_weights` does."""
        self._refresh(partial(self.engine.load_adapter, config), weights)

    def _refresh(
        self, load: Callable[[Iterable[tuple[str, Tensor]]], None], weights: Iterable[tuple[str, Tensor]]
    ) -> None:
        assert iter(weights) is not weights, "weights that can be gathered once only are lost with the engine"
        self._load, self._weights = load, weights
        self._send_weights(is_outdated=True)
        self._recover()

    def _send_weights(self, *, is_outdated: bool) -> None:
        """Gathers the weights, and sends them to this rank's engine if its own are outdated."""
        self.engine.weights_version = self.weights_version
        stream = WeightStream(self._weights)
        if is_outdated:
            self._attempt(lambda: self._load(stream))
        stream.drain()

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
        """See `RolloutEngine.generate`."""

        def generate() -> list[list[Completion]]:
            return self.engine.generate(
                prompt_ids,
                sampling,
                num_samples=num_samples,
                stop_token_ids=stop_token_ids,
                seeds=seeds,
                num_topk=num_topk,
            )

        return self._until_well(generate)

    def _until_well(self, task: Callable[[], T]) -> T:
        """The result of a task on the engine, which is restarted until the task is done. Collective."""
        result = self._attempt(task)
        while self._recover():
            if result is None:
                result = self._attempt(task)
        assert result is not None
        return result

    def _attempt(self, task: Callable[[], T]) -> T | None:
        """The result of a task on the engine; None if it fails, or has failed before."""
        if self._failure is None:
            try:
                return task()
            except EngineError as error:
                self._failure = error
        return None

    def _recover(self) -> bool:
        """Restarts the engines that have failed; False if there is none, and so no failure in a row any more."""
        if not any(failures := self._failures()):
            self._num_in_a_row = 0
            return False
        started = time.perf_counter()
        while any(failures):
            self._count(failures)
            self._restart()
            failures = self._failures()
        self._warn(f"the engine has the current weights again after {time.perf_counter() - started:.1f} s")
        return True

    @torch.no_grad()
    def _restart(self) -> None:
        """Starts this rank's engine again if it has failed, and gathers the weights for all that have."""
        has_failed = self._failure is not None
        # In inference mode, as in a validation, a sharded policy would keep tensors that it cannot train with.
        with torch.inference_mode(mode=False):
            if has_failed:
                self.engine.abandon()
                self._failure = None
                self._attempt(self._start)
            self._send_weights(is_outdated=has_failed)
            if has_failed and self._submitted:
                self._attempt(lambda: self.engine.submit(list(self._submitted.values())))

    def _count(self, failures: Sequence[str]) -> None:
        """Gives up if too many engines have failed in a row, and else says what happened."""
        if self._num_in_a_row >= self.engine.max_restarts:
            self._give_up(failures)
        self._num_in_a_row += 1
        self.engine.num_restarts += 1
        self._warn(
            f"{_summary(failures)}\nThe engine is started again ({self._num_in_a_row} of at most "
            f"{self.engine.max_restarts} times in a row)"
        )

    def _warn(self, message: str) -> None:
        """Warns, on the first rank, of what all ranks know."""
        if self._ranks.number == 0:
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    def _give_up(self, failures: Sequence[str]) -> NoReturn:
        own, self._failure = self._failure, None
        if own is not None and not self._num_in_a_row:
            raise own
        times = f"the engine failed {self._num_in_a_row + 1} times in a row; at last " if self._num_in_a_row else ""
        raise EngineError(f"{times}{_summary(failures)}") from own

    def _failures(self) -> list[str]:
        """What has failed on each rank, nothing where the engine is well. Collective."""
        return self._ranks.gather("" if self._failure is None else str(self._failure) or repr(self._failure))

    def _sleep(self) -> None:
        self._attempt(self.engine.sleep)

    def _wake(self) -> None:
        self._attempt(self.engine.wake)

    def abandon(self) -> None:
        """Ends the engine, to be started again by the same ranks."""
        self._failure = None
        self.engine.abandon()

    def close(self) -> None:
        """Ends the engine. Not collective."""
        self._failure = None
        self._ranks.leave()
        self._weights = ()
        self._submitted = {}
        self.engine.close()


def supervised(engine: RolloutEngine) -> RolloutEngine:
    """The engine, supervised if it can be restarted."""
    return SupervisedEngine(engine) if engine.max_restarts else engine


def _summary(failures: Sequence[str]) -> str:
    """The first of the failures of all ranks, and how many there are."""
    failed = [rank for rank, failure in enumerate(failures) if failure]
    if len(failures) == 1:
        return failures[0]
    others = f" (and those of {len(failed) - 1} other ranks)" if len(failed) > 1 else ""
    return f"the engine of rank {failed[0]}{others}: {failures[failed[0]]}"
