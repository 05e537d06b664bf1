"""Errors that are told apart from others."""

from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path


class SettingError(ValueError):
    """A setting, or a file that a setting names, cannot work; the message names it and the way out.

    Raised before anything heavy starts. The command line prints it without a traceback.
    """


class NonFiniteError(RuntimeError):
    """A number of the training is NaN or infinite; the message names it and the samples, and the run stops."""


@contextmanager
def loading_model(name: str) -> Iterator[None]:
    """Names the setting where files of the policy's model are not found or cannot be read.

    Args:
        name: folder or hub name of the model.

    Raises:
        SettingError: in place of an `OSError`, as transformers raises them.
    """
    try:
        yield
    except OSError as error:
        reason = str(error).strip().splitlines()
        parent = Path(name).expanduser().parent
        names = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
        close = get_close_matches(Path(name).name, names, n=1)
        meant = f" There is a folder {str(parent / close[0])!r}: is it meant?" if close else ""
        raise SettingError(
            f"`model.model` {name!r} cannot be loaded: {reason[0] if reason else type(error).__name__} Check the name, "
            "or give the folder of a model that you have downloaded; `drpo doctor` says whether the hub is reached."
            f"{meant}"
        ) from error
