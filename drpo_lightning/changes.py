"""What differs between the settings of a run and those of its continuation."""

from collections.abc import Iterator
from typing import Any, NamedTuple


class Change(NamedTuple):
    """A setting with another value.

    Attributes:
        name: its keys, with dots between them.
        before: its value, or the name of a class without the arguments; None where there was none.
        now: the same, in the continuation.
    """

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name}: {self.before} -> {self.now}"


def changes(before: Any, now: Any, name: str = "") -> Iterator[Change]:  # noqa: ANN401
    """Settings that differ; of another class the name alone, since its arguments have nothing to compare.

    Args:
        before: nested dicts and lists, in which an object is a dict with a `class_path` or `class`.
        now: the same, of the continuation.
        name: what stands before the names of all settings.
    """
    old, new = _by_class_name(before), _by_class_name(now)
    if old == new:
        return
    if isinstance(old, dict) and isinstance(new, dict) and class_name(old) == class_name(new):
        for key in {**old, **new}:
            yield from changes(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
    else:
        yield Change(name, class_name(before) or before, class_name(now) or now)


def class_name(value: Any) -> str | None:  # noqa: ANN401
    """The name of an object's class; None for what is no object."""
    return value.get("class_path", value.get("class")) if isinstance(value, dict) else None


def _by_class_name(value: Any) -> Any:  # noqa: ANN401
    """A list of objects as a dict, so that one more of them does not move the others; all else as it is."""
    if not isinstance(value, list) or not all(class_name(entry) for entry in value):
        return value
    named: dict[str, Any] = {}
    for entry in value:
        name = str(class_name(entry)).rpartition(".")[2]
        same = sum(other.partition(" ")[0] == name for other in named)
        named[f"{name} {same + 1}" if same else name] = entry
    return named
