"""What helps beyond the messages of the libraries that read a configuration."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from typing import Any

HINTS = {
    "requires a GPU accelerator": "Or take `ddp` or ModelParallelStrategy, which run on a CPU.",
    "invalid strategy name": "A class is written {class_path: ModelParallelStrategy, init_args: {data_parallel_size: "
    "2, tensor_parallel_size: 1}}.",
    "No supported gpu backend": "`trainer.accelerator: gpu` needs a GPU that PyTorch sees; `drpo doctor` says what is "
    "missing, and `cpu` trains without.",
    'key "model.model"': "Give a configuration that sets it, `--config FILE`: `drpo init` writes one.",
}
"""What helps, by a part of the message."""
UNKNOWN = re.compile(r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'")
UNKNOWN_OF_CLASS = re.compile(r"given class_path '([\w.]+)':\s+Option '(\w+)' is not accepted")


def with_hints(error: Exception | str, options: Iterable[str] = ()) -> str:
    """An error's message, and what helps beyond it.

    Args:
        error: the error, or its message.
        options: names of the settings that there are, of which one may have been meant.
    """
    message = str(error)
    hints = [hint for part, hint in HINTS.items() if part in message]
    return " ".join([message.rstrip(), *hints, *_likely_names(message, options)])


def _likely_names(message: str, options: Iterable[str]) -> list[str]:
    """What may have been meant by a name that is unknown, as a sentence."""
    if found := UNKNOWN_OF_CLASS.search(message):
        path, name = found.groups()
        near = get_close_matches(name, _parameters(path), n=1)
    elif found := UNKNOWN.search(message):
        section, dot, last = (found[1] or found[2]).rpartition(".")
        beside = [option.rpartition(".")[2] for option in options if option.rpartition(".")[0] == section]
        near = [section + dot + name for name in get_close_matches(last, beside, n=1)]
    else:
        return []
    return [f"Is `{near[0]}` meant?"] if near else []


def _parameters(path: str) -> Sequence[str]:
    """Names of a class's settings; none of one that does not say."""
    try:
        return list(signature(imported(path)).parameters)
    except (ImportError, AttributeError, TypeError, ValueError):
        return []


def imported(path: str) -> Any:  # noqa: ANN401
    """The class at an import path."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)
