"""The copy of the configuration that a run leaves: without the values that came from the environment."""

import os
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from omegaconf import OmegaConf
from omegaconf.resolvers import oc

INTERPOLATED: dict[str, str] = {}
"""Values of environment variables by `${oc.env:...}`, as the configuration has asked for them."""


def note_interpolations() -> None:
    """Has `${oc.env:NAME}` remember from now on what it stood for."""
    OmegaConf.register_resolver("oc.env", _env, replace=True)


def _env(name: str, *default: Any) -> Any:  # noqa: ANN401
    if os.environ.get(name):
        INTERPOLATED[f"${{oc.env:{name}}}"] = os.environ[name]
    return oc.env(name, *default)


def unresolved(value: Any) -> Any:  # noqa: ANN401
    """A setting with the interpolations that it was made of, wherever a text holds one of their values."""
    if isinstance(value, Namespace):
        return Namespace({key: unresolved(entry) for key, entry in vars(value).items()})  # type: ignore[no-untyped-call]
    if isinstance(value, dict):
        return {key: unresolved(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(unresolved, value))
    if isinstance(value, str):
        for interpolation, text in sorted(INTERPOLATED.items(), key=lambda item: -len(item[1])):
            value = value.replace(text, interpolation)
    return value


class SaveUnresolvedConfig(SaveConfigCallback):
    """Lightning's, of a configuration whose `${oc.env:NAME}` stay what they are: they may be keys."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(parser, unresolved(config), *args, **kwargs)
