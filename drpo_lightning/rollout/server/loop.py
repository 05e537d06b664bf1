"""An event loop beside the code that is not asynchronous."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import wait
from typing import Any, TypeVar

from drpo_lightning.rollout.engine import WaitEnded

POLL_SECONDS = 1.0
T = TypeVar("T")


class BackgroundLoop:
    """An event loop in a thread of its own: there may be one in the caller's already, as in a notebook."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-servers", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T], *, is_run_to_end: Callable[[], bool] = bool) -> T:
        """The result of a coroutine, which is cancelled if the caller is interrupted.

        Args:
            coroutine: what is computed.
            is_run_to_end: says whether it has no use any more.

        Raises:
            WaitEnded: if it has not.
        """
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            while not wait([future], timeout=POLL_SECONDS).done:
                if is_run_to_end():
                    raise WaitEnded  # noqa: TRY301
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Ends the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
