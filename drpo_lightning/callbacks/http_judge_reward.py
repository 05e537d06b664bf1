"""A judge behind an HTTP server."""

import asyncio
import http.client
import json
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from socket import SHUT_RDWR, socket
from typing import Any
from urllib.parse import urlsplit

from drpo_lightning.addresses import key_from_environment
from drpo_lightning.callbacks.async_reward import AsyncReward
from drpo_lightning.rewards import RewardError, RewardSample

MAX_ANSWER_BYTES = 2**20
WORTH_ANOTHER_TRY = {408, 425, 429}
"""With these, and from 500 on, a server says that it may do better later."""


class JudgeError(RuntimeError):
    """The judge gave no score, but may do so another time."""


class HTTPJudgeReward(AsyncReward):
    """Asks a server for the score of each completion.

    POSTs JSON `{"prompt": ..., "completion": ..., "columns": {...}}` and expects status 200 with
    `{"score": <float or null>}`; null is a completion that the reward does not apply to. A connection that fails, an
    answer that is none, and the statuses 408, 425, 429 and from 500 on are tried again; other statuses are not.
    Redirects are not followed, and proxies not used: the key goes where `url` says and nowhere else.

    Args:
        url: of the judge, with http or https and without a user or password.
        columns: columns of the data set that are sent; none by default.
        api_key_variable: environment variable that holds a key, sent as `Authorization: Bearer <key>`. The key itself
            stands in no configuration, log or stored failure.
        name: what it is logged as.
        settings: see `AsyncReward`.

    Raises:
        ValueError: if a setting is out of range.
        SettingError: if the environment variable is not set, or no key.
    """

    def __init__(
        self,
        url: str,
        columns: list[str] | None = None,
        api_key_variable: str | None = None,
        name: str = "judge",
        **settings: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(name=name, **settings)
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
            raise ValueError("`url` must be http://host/... or https://host/..., without a user or password")
        _ = parts.port  # raises a ValueError of its own if it is no number
        self.required_columns = tuple(columns or ())
        self.api_key_variable = api_key_variable
        self._host, self._is_secure = parts.netloc, parts.scheme == "https"
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._key()
        self._threads: ThreadPoolExecutor | None = None

    def _key(self) -> str | None:
        return key_from_environment("api_key_variable", self.api_key_variable)

    @asynccontextmanager
    async def session(self) -> AsyncIterator[None]:
        """Threads that wait for the answers."""
        self._threads = ThreadPoolExecutor(self.max_concurrency, thread_name_prefix="judge")
        try:
            yield
        finally:
            self._threads.shutdown(wait=False, cancel_futures=True)

    async def score_one(self, sample: RewardSample) -> float | None:
        """See the class."""
        columns = {name: sample.columns[name] for name in self.required_columns}
        request = {"prompt": sample.prompt, "completion": sample.completion, "columns": columns}
        try:
            body = json.dumps(request).encode()
        except (TypeError, ValueError) as error:
            raise RewardError(f"cannot send the columns {list(columns)} as JSON: {error}") from error
        sockets: list[socket] = []
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._ask, body, sockets)
        finally:  # after a timeout: a server may send a byte now and then for ever, and its thread is let go
            for opened in sockets:
                with suppress(OSError):
                    opened.shutdown(SHUT_RDWR)

    def _ask(self, body: bytes, sockets: list[socket]) -> float | None:
        """Sends the request and reads the answer, in a thread."""
        kind = http.client.HTTPSConnection if self._is_secure else http.client.HTTPConnection
        connection = kind(self._host, timeout=self.timeout_seconds)
        try:
            connection.connect()
            sockets.append(connection.sock)
            connection.request("POST", self._target, body, self._headers())
            with connection.getresponse() as response:
                data = response.read(MAX_ANSWER_BYTES)
                if response.length:  # of what was announced and did not come
                    raise JudgeError(f"an answer that ends too early, or is longer than {MAX_ANSWER_BYTES} bytes")
                return _score_in(response.status, data)  # type: ignore[no-any-return]
        finally:
            connection.close()

    def _headers(self) -> dict[str, str]:
        key = self._key()
        return {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})


def _score_in(status: int, data: bytes) -> Any:  # noqa: ANN401 - is checked by `AsyncReward`
    """The score in an answer.

    Raises:
        JudgeError: if there is none, and another try may bring one.
        RewardError: if another try will not.
    """
    if status in WORTH_ANOTHER_TRY or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise JudgeError(f"status {status}")
    if status != HTTPStatus.OK:
        raise RewardError(f"was answered with status {status}: {data[:100]!r}")
    try:
        return json.loads(data)["score"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise JudgeError(f"no JSON with a `score`, but {data[:100]!r}") from error
