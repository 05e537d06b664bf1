"""Where a server is, and the key that it asks for."""

import ipaddress
import os
from urllib.parse import urlsplit

from drpo_lightning.errors import SettingError


def checked_url(setting: str, url: str, *, is_base: bool = True) -> str:
    """A URL with http or https, and without a user, a password and a fragment.

    Args:
        setting: name of the setting that holds it.
        url: the URL.
        is_base: True for one that paths are added to: it has no query, and loses the slash at its end.

    Raises:
        ValueError: if it is another.
    """
    parts = urlsplit(url)
    is_plain = not (parts.username or parts.password or parts.fragment or (is_base and parts.query))
    if parts.scheme not in ("http", "https") or not parts.hostname or not is_plain:
        raise ValueError(f"`{setting}` must be http://host:port or https://host:port, without a user or password")
    _ = parts.port  # raises a ValueError of its own if it is no number
    return url.rstrip("/") if is_base else url


def is_loopback(url: str) -> bool:
    """True if a URL leads to this machine, as far as its host can tell without a look-up."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def key_from_environment(setting: str, variable: str | None) -> str | None:
    """The key in an environment variable, read whenever it is needed and kept nowhere; None without a variable.

    Args:
        setting: name of the setting that names the variable.
        variable: name of the variable.

    Raises:
        SettingError: if the variable is not set, or holds no key.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key or not key.isprintable() or not key.isascii():
        raise SettingError(f"`{setting}` names the environment variable {variable!r}, which holds no key")
    return key
