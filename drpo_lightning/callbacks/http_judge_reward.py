"""A judge behind an HTTP server."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

import aiohttp

from drpo_lightning.addresses import checked_url, key_from_environment
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
        api_key_env: environment variable that holds a key, sent as `Authorization: Bearer <key>`. The key itself
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
        api_key_env: str | None = None,
        name: str = "judge",
        **settings: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(name=name, **settings)
        self.url = checked_url("url", url, is_base=False)
        self.required_columns = tuple(columns or ())
        self.api_key_env = api_key_env
        key_from_environment("api_key_env", api_key_env)
        self._session: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def session(self) -> AsyncIterator[None]:
        """Opens a connection for each request; certificates are checked, and proxies not used."""
        key = key_from_environment("api_key_env", self.api_key_env)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector, headers=headers) as self._session:
            yield
        self._session = None

    async def score_one(self, sample: RewardSample) -> float | None:
        """See the class."""
        columns = {name: sample.columns[name] for name in self.required_columns}
        request = {"prompt": sample.prompt, "completion": sample.completion, "columns": columns}
        try:
            body = json.dumps(request).encode()
        except (TypeError, ValueError) as error:
            raise RewardError(f"cannot send the columns {list(columns)} as JSON: {error}") from error
        assert self._session is not None, "a batch is scored in `session`"
        headers = {"Content-Type": "application/json"}
        async with self._session.post(self.url, data=body, headers=headers, allow_redirects=False) as response:
            data = bytearray()
            async for chunk in response.content.iter_any():
                data += chunk
                if len(data) > MAX_ANSWER_BYTES:
                    raise JudgeError(f"an answer longer than {MAX_ANSWER_BYTES} bytes")
            return _score_in(response.status, bytes(data))  # type: ignore[no-any-return]


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
