"""The command `drpo serve`: starts a vLLM server as `VLLMServerEngine` needs it."""

import argparse
import importlib.util
import json
import os
import secrets
import shlex
import sys
from collections.abc import Sequence
from typing import NamedTuple

from drpo_lightning.addresses import is_loopback, key_from_environment
from drpo_lightning.errors import SettingError
from drpo_lightning.packages import installed_version

TRANSFERS = ("nccl", "drpo_http")
OWN_OPTIONS = {
    "--api-key": "it would stand in the list of processes; name a variable with `--api-key-env`",
    "--disable-log-stats": "the trainer sees a server's progress by what it counts",
    "--generation-config": "the trainer says how to sample",
    "--logits-processors": "logprobs must be those of the policy",
    "--logprobs-mode": "logprobs must be those of the distribution that was sampled from",
    "--max-logprobs": "the trainer says how many of the most likely tokens it wants",
    "--middleware": "that of `--api-key-env` guards every endpoint",
    "--override-generation-config": "the trainer says how to sample",
    "--weight-transfer-config": "set `--transfer`",
    "--worker-extension-cls": "set `--transfer`",
}
"""Options of vLLM that are set here, and why."""


class Command(NamedTuple):
    """What starts a server.

    Attributes:
        words: the command.
        environment: variables that are set for it.
        key_variable: variable whose value it gets as its API key.
    """

    words: list[str]
    environment: dict[str, str]
    key_variable: str | None

    def __str__(self) -> str:
        """As a shell takes it; the key is not in it."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        if self.key_variable is not None:
            variables.append(f'VLLM_API_KEY="${self.key_variable}"')
        return " ".join([*variables, shlex.join(self.words)])


def server_command(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    transfer: str = "nccl",
    api_key_env: str | None = None,
    trusted_network: bool = False,
    on_cpu: bool = False,
    options: Sequence[str] = (),
) -> Command:
    """The command that starts a vLLM server for rollouts.

    Args:
        model: folder or hub name of the policy.
        host: address to listen at.
        port: port to listen at.
        transfer: how weights come: `nccl` between GPUs, `drpo_http` in the body of requests.
        api_key_env: environment variable that holds the API key, which every endpoint but `/health` then asks for.
        trusted_network: confirms that only the trainer reaches the address.
        on_cpu: whether vLLM computes on a CPU.
        options: further options of `vllm serve`.

    Raises:
        SettingError: if an option is set here, or the address is open to a network that is not confirmed.
    """
    for option in options:
        name = option.partition("=")[0].replace("_", "-")
        if name in OWN_OPTIONS:
            raise SettingError(f"`{name}` is set by `drpo serve`: {OWN_OPTIONS[name]}")
    is_open = not is_loopback(f"http://[{host}]" if ":" in host else f"http://{host}")
    if is_open and not (api_key_env or trusted_network):
        raise SettingError(
            f"`--host {host}` lets others reach the server, and whoever reaches it can replace its weights: set "
            "`--api-key-env`, or confirm with `--trusted-network` that only the trainer can (see SECURITY.md)"
        )
    words = [
        *_entry_point(model),
        *("--host", host, "--port", str(port)),
        *("--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1", "--generation-config", "vllm"),
        *("--seed", str(secrets.randbelow(2**31))),  # for requests without one; a later `--seed` counts
        "--enable-scale-out",  # has the endpoint that takes tokens and gives tokens
        *("--weight-transfer-config", json.dumps({"backend": transfer})),
    ]
    if transfer == "drpo_http":
        words += ["--worker-extension-cls", "drpo_lightning.rollout.server.worker.WeightReceiver"]
    if api_key_env is not None:
        words += ["--middleware", "drpo_lightning.rollout.server.guard.RequireKey"]
    environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if on_cpu:
        # vLLM compiles the ranking of logprobs at the first request, even when eager: it would need a C++ compiler.
        # Without Dynamo it cannot compile the model either.
        words.append("--enforce-eager")
        # A seeded prompt that is computed in parts ends vLLM's engine: "CPU Generator does not use offset".
        words.append("--no-enable-chunked-prefill")
        environment |= {"TORCHDYNAMO_DISABLE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        environment["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")
    if importlib.util.find_spec("flashinfer") is None:
        environment["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    return Command([*words, *options], environment, api_key_env)


def _is_for_cpu() -> bool:
    """True if vLLM is installed, and for CPUs."""
    return bool(installed_version("vllm-cpu")) or "cpu" in (installed_version("vllm") or "")


def _entry_point(model: str) -> list[str]:
    """`vllm serve`; vllm-cpu does not find its own version under that command."""
    if installed_version("vllm-cpu") and not installed_version("vllm"):
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]


def main(arguments: list[str]) -> None:
    """`drpo serve MODEL [OPTIONS] [OPTIONS OF vllm serve]`; becomes vLLM's process."""
    parser = argparse.ArgumentParser(
        prog="drpo serve",
        usage="drpo serve MODEL [OPTIONS] [OPTIONS OF vllm serve]",
        description="Starts a vLLM server for `VLLMServerEngine`. Options that are not listed go to `vllm serve`, such "
        "as --dtype, --max-model-len, --tensor-parallel-size and --data-parallel-size.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="folder or hub name of the policy; comes first")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen at (default: 8000)")
    parser.add_argument("--transfer", choices=TRANSFERS, help="how weights come (default: nccl; drpo_http on a CPU)")
    parser.add_argument("--api-key-env", help="environment variable that holds the API key, for all endpoints")
    parser.add_argument("--trusted-network", action="store_true", help="confirms that only the trainer reaches it")
    parser.add_argument("--print", action="store_true", help="prints the command and does not run it")
    settings, options = parser.parse_known_args(arguments)
    if settings.model != arguments[0]:  # it might be the value of one of vLLM's options
        parser.error(f"MODEL must come first, got {arguments[0]!r}")
    try:
        command, environment = _prepared(settings, options)
    except SettingError as error:
        print(f"drpo: error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    if settings.print:
        print(command)  # noqa: T201
        return
    os.execve(command.words[0], command.words, environment)


def _prepared(settings: argparse.Namespace, options: list[str]) -> tuple[Command, dict[str, str]]:
    """The command, and the whole environment that it gets."""
    if importlib.util.find_spec("vllm") is None and not settings.print:
        raise SettingError("vLLM is not installed: pip install 'drpo-lightning[vllm]'")
    on_cpu = _is_for_cpu()
    command = server_command(
        settings.model,
        host=settings.host,
        port=settings.port,
        transfer=settings.transfer or ("drpo_http" if on_cpu else "nccl"),
        api_key_env=settings.api_key_env,
        trusted_network=settings.trusted_network,
        on_cpu=on_cpu,
        options=options,
    )
    environment = {**os.environ, **command.environment}
    if not settings.print and (key := key_from_environment("--api-key-env", settings.api_key_env)) is not None:
        environment["VLLM_API_KEY"] = key
    return command, environment
