"""In vLLM's HTTP server: every question needs the key. Imported by vLLM alone."""

import hashlib
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

KEY_VARIABLE = "VLLM_API_KEY"
"""Where vLLM takes its key from, and the guard, too."""
OPEN_PATHS = {"/health"}
"""For those who only want to know whether it lives."""

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]


class RequireKey:
    """Answers 401 to a request without `Authorization: Bearer <key>`: vLLM itself guards `/v1` and the like only.

    Args:
        app: the server.

    Raises:
        ValueError: if there is no key.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        key = os.environ.get(KEY_VARIABLE, "")
        if not key:
            raise ValueError(f"the environment variable {KEY_VARIABLE} holds no key")
        self._expected = _digest(f"Bearer {key}".encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Lets a request through, or not."""
        if scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS or self._has_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
        else:
            await send({"type": "websocket.close"})

    def _has_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        return len(given) == 1 and secrets.compare_digest(_digest(given[0]), self._expected)


def _digest(text: bytes) -> bytes:
    """Of one length, whatever is compared."""
    return hashlib.sha256(text).digest()
