"""Which rows a table or a figure is about."""

from collections.abc import Iterable, Sequence
from typing import Any

from study.grid import OBJECTIVES, SETTINGS
from study.intervals import Row

NUM_DELTA_SEEDS = 3
PLACES = {name: place for names in (SETTINGS, OBJECTIVES) for place, name in enumerate(names)}


def place(setting: str, objective: str) -> tuple[int, int]:
    """Rows stand in the order of settings, then objectives; what the grid does not name comes last."""
    return PLACES.get(setting, len(PLACES)), PLACES.get(objective, len(PLACES))


def order(row: Row) -> tuple[tuple[int, int], int]:
    """By `place`, then seed."""
    return place(row["setting"], row["objective"]), row["seed"]


def select(
    rows: Iterable[Row], phase: str | None = None, setting: str | None = None, objective: str | None = None
) -> list[Row]:
    """The rows of a phase, a setting and an objective, in order; None takes all."""
    return sorted(
        (
            row
            for row in rows
            if phase in (None, row["phase"])
            and setting in (None, row["setting"])
            and objective in (None, row["objective"])
        ),
        key=order,
    )


def groups(rows: Iterable[Row], *fields: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows with equal fields together, in order."""
    result: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(rows, key=order):
        result.setdefault(tuple(row[field] for field in fields), []).append(row)
    return result


def at_delta(rows: Sequence[Row], delta: float, setting: str) -> list[Row]:
    """The first seeds of DRPO with this delta, at the rate of the evaluation, whichever phase made them."""
    name = f"DRPO {delta:g}"
    runs = select(rows, "main", setting, name) + select(rows, "delta", setting, name)
    return [row for row in runs if row["seed"] < NUM_DELTA_SEEDS]
