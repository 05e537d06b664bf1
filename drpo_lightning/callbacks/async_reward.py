"""Rewards that wait for something else, such as a judge behind a server: many at a time, tried again, bounded."""

import asyncio
import random
import threading
import time
from abc import abstractmethod
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from drpo_lightning.callbacks.fallible_reward import FallibleReward
from drpo_lightning.rewards import RewardBatch, RewardError, RewardFailure, RewardSample
from drpo_lightning.rewards.base import RewardOutcome, checked_score

MAX_REASON_CHARACTERS = 500
PULSE_SECONDS = 0.2
MAX_SILENCE_SECONDS = 30.0
"""How long the event loop may stand still."""


class AsyncReward(FallibleReward):
    """A reward whose `score_one` is a coroutine: what a user subclasses for judges behind a server.

    ```python
    class Judge(AsyncReward):
        async def score_one(self, sample):
            return await my_client.rate(sample.prompt, sample.completion)
    ```

    A try that raises, takes longer than `timeout_seconds` or returns no score is repeated after a pause that doubles
    from try to try and is drawn from its upper half; `RewardError` is not repeated: raise it where another try would
    not help. What the last try came to is counted, stored and treated by `on_failure`. The order in which completions
    are scored is not fixed.

    Every batch is scored in an event loop of its own, in a thread of its own: open connections in `session`. A
    `score_one` that does not give the loop back for half a minute ends the run.

    Args:
        max_concurrency: completions of each rank that are scored at the same time.
        timeout_seconds: for one try.
        max_retries: tries after the first.
        backoff_seconds: pause before the second try, at most.
        max_backoff_seconds: longest pause.
        seed: of the pauses.
        settings: `weight`, `name` and what becomes of failures, see `FallibleReward`.

    Raises:
        ValueError: if a setting is out of range.
    """

    def __init__(
        self,
        max_concurrency: int = 16,
        timeout_seconds: float = 60.0,
        max_retries: int = 3,
        backoff_seconds: float = 1.0,
        max_backoff_seconds: float = 30.0,
        seed: int = 0,
        **settings: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**settings)
        for key, value in (("max_concurrency", max_concurrency), ("timeout_seconds", timeout_seconds)):
            if not 0 < value < float("inf"):
                raise ValueError(f"`{key}` must be positive and finite, got {value}")
        for key, value in (
            ("max_retries", max_retries),
            ("backoff_seconds", backoff_seconds),
            ("max_backoff_seconds", max_backoff_seconds),
        ):
            if not 0 <= value < float("inf"):
                raise ValueError(f"`{key}` must be 0 or positive, and finite, got {value}")
        self.max_concurrency = max_concurrency
        self.timeout_seconds = timeout_seconds
        self.max_retries = max_retries
        self.backoff_seconds = backoff_seconds
        self.max_backoff_seconds = max_backoff_seconds
        self._random = random.Random(seed)

    @abstractmethod
    async def score_one(self, sample: RewardSample) -> float | None:
        """A finite float, or None where the reward does not apply.

        Raises:
            RewardError: for a failure that another try would not mend. Anything else is tried again.
        """

    @asynccontextmanager
    async def session(self) -> AsyncIterator[None]:
        """Is entered around the scoring of a batch, in its event loop."""
        yield

    def outcomes(self, batch: RewardBatch) -> Sequence[RewardOutcome]:
        """Scores all completions, `max_concurrency` at a time.

        Raises:
            RewardError: if the event loop is blocked.
        """
        return _EventLoopThread(self._score_all(batch)).result()

    async def _score_all(self, batch: RewardBatch) -> list[RewardOutcome]:
        slots = asyncio.Semaphore(self.max_concurrency)

        async def scored(sample: RewardSample) -> RewardOutcome:
            async with slots:
                return await self._outcome(sample)

        async with self.session():
            return list(await asyncio.gather(*(scored(batch.sample(i)) for i in range(len(batch)))))

    async def _outcome(self, sample: RewardSample) -> RewardOutcome:
        """The score, or the failure of the last try."""
        outcome, is_final = await self._try(sample)
        for retry in range(self.max_retries):
            if is_final:
                break
            longest = min(self.backoff_seconds * 2**retry, self.max_backoff_seconds)
            await asyncio.sleep(longest * self._random.uniform(0.5, 1.0))
            outcome, is_final = await self._try(sample)
        return outcome

    async def _try(self, sample: RewardSample) -> tuple[RewardOutcome, bool]:
        """What one try comes to, and whether it is the last."""
        task = asyncio.ensure_future(self._score_without_exit(sample))
        try:
            done, _ = await asyncio.wait({task}, timeout=self.timeout_seconds)
        finally:
            task.cancel()  # not awaited: code that does not let itself be cancelled holds nobody up
        if not done:
            return RewardFailure("timeout", f"took longer than {self.timeout_seconds:g} s"), False
        try:
            return checked_score(task.result()), True
        except asyncio.CancelledError:
            return RewardFailure("error", "was cancelled by its own code"), False
        except Exception as error:  # noqa: BLE001 - other people's code may raise anything
            is_late = isinstance(error, TimeoutError)
            return RewardFailure("timeout" if is_late else "error", _reason(error)), isinstance(error, RewardError)

    async def _score_without_exit(self, sample: RewardSample) -> float | None:
        """`score_one`; a `sys.exit` in it would end the event loop at once."""
        try:
            return await self.score_one(sample)
        except SystemExit as error:
            raise RewardError(f"raised SystemExit: {error}") from error


def _reason(error: BaseException) -> str:
    is_said = isinstance(error, RewardError) or (isinstance(error, ValueError) and str(error).startswith("returned "))
    text = str(error) if is_said else f"raised {type(error).__name__}: {error}"
    return text[:MAX_REASON_CHARACTERS]


class _EventLoopThread:
    """Runs a coroutine in an event loop of its own thread: there may be a loop in this one, as in a notebook."""

    def __init__(self, coroutine: Coroutine[Any, Any, list[RewardOutcome]]) -> None:
        self._coroutine = coroutine
        self._result: list[RewardOutcome] = []
        self._error: BaseException | None = None
        self._done = threading.Event()
        self._pulse = 0.0
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def result(self) -> list[RewardOutcome]:
        """Runs it to its end. On Ctrl-C it is cancelled.

        Raises:
            RewardError: if the loop stands still for `MAX_SILENCE_SECONDS`.
        """
        self._pulse = time.monotonic()
        threading.Thread(target=self._run, name="async-reward", daemon=True).start()
        try:
            # Not until the thread ends: code that does not let itself be cancelled may still be in it.
            while not self._done.wait(PULSE_SECONDS):
                self._check_pulse()
        except BaseException:
            if self._loop is not None and self._stop is not None:
                self._loop.call_soon_threadsafe(self._stop.set)
            raise
        if self._error is not None:
            raise self._error
        return self._result

    def _check_pulse(self) -> None:
        if time.monotonic() - self._pulse > MAX_SILENCE_SECONDS:
            raise RewardError(
                f"`score_one` has not given the event loop back for {MAX_SILENCE_SECONDS:g} s: it must wait with "
                "`await` only. Let code that blocks run by `asyncio.to_thread`"
            )

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:  # noqa: BLE001 - is raised in the thread that waits
            self._error = error
        finally:
            self._done.set()

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        task = asyncio.ensure_future(self._coroutine)
        stop = asyncio.ensure_future(self._stop.wait())
        while not task.done() and not stop.done():
            self._pulse = time.monotonic()
            await asyncio.wait({task, stop}, timeout=PULSE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if task.done():
            self._result = task.result()
            self._done.set()
        else:
            task.cancel()
