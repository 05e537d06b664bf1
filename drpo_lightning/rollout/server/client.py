"""One vLLM server, asked over HTTP."""

import asyncio
import errno
import io
import json
from http import HTTPStatus
from typing import Any, NamedTuple

import aiohttp
import torch

from drpo_lightning.batch import Completion
from drpo_lightning.errors import SettingError
from drpo_lightning.rollout.server.messages import completions_in
from drpo_lightning.rollout.server.sent import SentWeights
from drpo_lightning.rollout.server.weights import HTTP_BACKEND, NCCL_BACKEND

MAX_REASON_CHARACTERS = 500
WORTH_ANOTHER_TRY = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
QUICK_SECONDS = 10.0
"""For an answer that takes no computation."""
COUNTERS = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")
"""Metrics of a server that grow at every step in which it computes something."""
HOW_TO_START = "start it with `drpo serve`, which sets what is needed (docs/deployment.md)"


class ServerError(RuntimeError):
    """A server did not answer as it should, but it or another one may do better."""


class ServerGoneError(ServerError):
    """Nothing listens at a server's address."""


class ServerInfo(NamedTuple):
    """What a server says of itself.

    Attributes:
        context_tokens: most tokens of a sequence.
        cache_block_tokens: tokens of one block of the prefix cache; 0 without one.
        dtype_name: precision of the weights.
        backend: how it receives weights: `HTTP_BACKEND` or `NCCL_BACKEND`.
        num_workers: processes that receive them.
        instance: a name that no other start of a server has.
        seed: of what it draws without a seed of the request.
    """

    context_tokens: int
    cache_block_tokens: int
    dtype_name: str
    backend: str
    num_workers: int
    instance: str
    seed: int


class VLLMServer:
    """A vLLM server.

    Args:
        session: what connections are made with.
        url: without a slash at its end.
        headers: of every request, the key among them.
        sent: what all servers have been sent.

    Attributes:
        version: label of the weights that it was given last.
        failure: why it is asked for nothing until it gets weights again; empty if nothing has happened.
        tasks: requests that it has not answered yet.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, headers: dict[str, str], sent: SentWeights) -> None:
        self.url = url
        self.version = ""
        self.failure = ""
        self.tasks: set[asyncio.Task[list[Completion]]] = set()
        self._session = session
        self._headers = headers
        self._sent = sent

    def __str__(self) -> str:
        return f"the server {self.url}"

    @property
    def is_current(self) -> bool:
        """True if it may be asked for samples."""
        return bool(self.version) and not self.failure

    def accept(self, version: str) -> None:
        """Notes that it has weights, and may be asked for samples."""
        self.version, self.failure = version, ""

    def leave(self, failure: str) -> None:
        """Waits for no answer any more, and asks for nothing until it gets weights again."""
        self.failure = failure
        for task in self.tasks:
            task.cancel()

    async def ask(
        self,
        method: str,
        path: str,
        content: dict[str, Any] | bytes | None = None,
        *,
        timeout_seconds: float | None = QUICK_SECONDS,
    ) -> Any:  # noqa: ANN401
        """The JSON of an answer, or its text if it is none. Redirects are not followed.

        Args:
            method: `GET` or `POST`.
            path: what is asked for.
            content: sent as JSON; bytes are JSON already.
            timeout_seconds: how long the answer may take.

        Raises:
            ServerError: if there is no answer, or the server says that it failed.
            ServerGoneError: if nothing listens at its address.
            SettingError: if it refuses the question.
        """
        body = json.dumps(content).encode() if isinstance(content, dict) else content
        try:
            async with self._session.request(
                method,
                self.url + path,
                data=None if body is None else io.BytesIO(body),
                headers=self._headers | ({} if body is None else {"Content-Type": "application/json"}),
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(timeout_seconds, sock_connect=QUICK_SECONDS),
            ) as response:
                data = await response.read()
        except TimeoutError as error:
            raise ServerError(f"{self} did not answer {path} within {timeout_seconds or QUICK_SECONDS:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error, OSError) and error.errno == errno.ECONNREFUSED:
                why = "connection refused (not started, or still loading)"  # vLLM listens once it has loaded the model
                raise ServerGoneError(f"{self} did not answer {path}: {why}") from error
            raise ServerError(f"{self} did not answer {path}: {error or repr(error)}") from error
        self._check_status(path, response.status, data)
        return _content(data)

    def _check_status(self, path: str, status: int, data: bytes) -> None:
        """Raises unless the status is 200."""
        if status == HTTPStatus.OK:
            return
        reason = f"{self} answered {path.partition('?')[0]} with status {status}"
        said = data.decode(errors="replace")[:MAX_REASON_CHARACTERS]
        if status in WORTH_ANOTHER_TRY or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise ServerError(f"{reason}: {said}")
        if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
            said = "redirects are not followed; give the address that it leads to in `urls`"
        elif status == HTTPStatus.UNAUTHORIZED:
            said = "it wants another key; `api_key_env` names the variable that holds it"
        elif status in (HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND):
            said = f"it has not what a rollout needs; {HOW_TO_START}. It says: {said}"
        raise SettingError(f"{reason}: {said}")

    async def info(self, device: torch.device) -> ServerInfo:
        """Asks whether it is well, and how it is set.

        Args:
            device: the trainer's.

        Raises:
            ServerError: if it is not well.
            SettingError: if a setting of it would make wrong samples, or it cannot do what is needed.
        """
        await self.ask("GET", "/health")
        await self.progress()
        described = await self.ask("GET", "/server_info?config_format=json", timeout_seconds=60)
        world = await self.ask("GET", "/get_world_size")
        await self.ask("POST", "/inference/v1/abort_requests", {"request_ids": []})  # is there if generation is
        try:
            return self._info_in(described["vllm_config"], world["world_size"], device)
        except (KeyError, TypeError, AttributeError) as error:
            raise SettingError(f"{self} does not describe itself as vLLM does: {error!r}; {HOW_TO_START}") from error

    def _info_in(self, config: dict[str, Any], num_workers: int, device: torch.device) -> ServerInfo:
        model, cache = config["model_config"], config["cache_config"]
        backend = str((config["weight_transfer_config"] or {}).get("backend"))
        wanted: dict[str, Any] = {
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",
            "override_generation_config": {},
            "logits_processors": None,
            "max_logprobs": -1,
        }
        problems = [
            f"`{name}` is {model[name]!r} instead of {value!r}"
            for name, value in wanted.items()
            if model[name] != value
        ]
        if backend not in (HTTP_BACKEND, NCCL_BACKEND):
            problems.append(f"it receives weights by {backend!r} instead of {HTTP_BACKEND!r} or {NCCL_BACKEND!r}")
        if backend == NCCL_BACKEND and device.type != "cuda":
            problems.append(f"it receives weights by NCCL, and the trainer is on {device.type!r} (see `--transfer`)")
        if problems:
            raise SettingError(f"{self} cannot be used: {'; '.join(problems)}; {HOW_TO_START}")
        return ServerInfo(
            context_tokens=model["max_model_len"],
            cache_block_tokens=cache["block_size"] if cache["enable_prefix_caching"] else 0,
            dtype_name=model["quantization"] or model["dtype"].removeprefix("torch."),
            backend=backend,
            num_workers=num_workers,
            instance=config["instance_id"],
            seed=model["seed"],
        )

    async def begin_update(self, timeout_seconds: float, *, keeps_requests: bool) -> None:
        """Pauses it, and makes it ready for weights.

        Args:
            timeout_seconds: how long each step may take.
            keeps_requests: whether its requests stop between two tokens, of which nothing stays cached, and go on with
                the new weights; or else are ended.
        """
        mode = "keep&clear_cache=true" if keeps_requests else "abort"
        await self.ask("POST", f"/pause?mode={mode}", timeout_seconds=timeout_seconds)
        try:
            await self.ask("POST", "/start_weight_update", timeout_seconds=timeout_seconds)
        except ServerError:  # a trainer that was ended in the middle of an update has left it open
            await self.ask("POST", "/finish_weight_update", timeout_seconds=timeout_seconds)
            await self.ask("POST", "/start_weight_update", timeout_seconds=timeout_seconds)

    async def update(self, message: bytes, timeout_seconds: float) -> None:
        """Sends a bucket of weights, or announces one."""
        await self.ask("POST", "/update_weights", message, timeout_seconds=timeout_seconds)

    async def finish_update(self, version: str, timeout_seconds: float) -> None:
        """Makes it sample with the new weights, and forget every cached prefix."""
        await self.ask("POST", "/finish_weight_update", {"weight_version": version}, timeout_seconds=timeout_seconds)
        if not (await self.ask("POST", "/reset_prefix_cache"))["success"]:
            raise ServerError(f"{self} could not reset its prefix cache: requests of an earlier rollout hold blocks")
        await self.ask("POST", "/resume")
        await self.check(version)

    async def check(self, version: str) -> None:
        """Raises `ServerError` if it is not well, or has other weights than those of a label or later ones."""
        await self.ask("GET", "/health")
        found = (await self.ask("GET", "/weight_info"))["weight_version"]
        if found not in self._sent.since(version):
            raise ServerError(
                f"{self} has weights {found!r} instead of {version!r}: it was started again, or serves another trainer"
            )

    async def generate(self, message: dict[str, Any], num_topk: int, version: str) -> list[Completion]:
        """The completions of a prompt.

        Args:
            message: see `generate_message`.
            num_topk: most likely tokens that were asked for at each place.
            version: label of the weights that it has when it is asked; it may be sent others meanwhile.

        Raises:
            ServerError: if there are none, or they are not of those weights and later ones.
        """
        answer = await self.ask("POST", "/inference/v1/generate", message, timeout_seconds=None)
        try:
            return completions_in(answer, message, num_topk, self._sent.since(version))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ServerError(f"{self} gave no completions: {error!r}") from error

    async def progress(self) -> float:
        """A number that grows while it computes."""
        text = await self.ask("GET", "/metrics")
        counts = [line.rpartition(" ")[2] for line in str(text).splitlines() if line.startswith(COUNTERS)]
        if not counts:
            raise SettingError(f"{self} does not count tokens, by which its progress is seen; {HOW_TO_START}")
        return sum(map(float, counts))


def _content(data: bytes) -> Any:  # noqa: ANN401
    """What a JSON text says, or the text itself if it is none."""
    try:
        return json.loads(data)
    except ValueError:
        return data.decode(errors="replace")
