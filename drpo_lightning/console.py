"""What people read on a terminal or in its log."""

import sys
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

PLAIN_WIDTH = 200
"""Characters of a line where the output is no terminal, so that no table is folded in a log file."""


def console() -> Console:
    """Writes to standard output, in colour on a terminal, in plain lines elsewhere."""
    is_terminal = sys.stdout.isatty()
    return Console(width=None if is_terminal else PLAIN_WIDTH, highlight=False, soft_wrap=False)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, num_texts: int = 1) -> None:
    """Prints a table whose first columns are texts and whose others are numbers.

    Args:
        title: what stands above it.
        header: names of the columns.
        rows: their cells, as they are shown.
        num_texts: how many columns are texts.
    """
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(header):
        is_text = i < num_texts
        table.add_column(
            escape(name),
            justify="left" if is_text else "right",
            no_wrap=not is_text or num_texts == 1,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*map(escape, row))
    screen = console()
    if num_texts == 1:  # wider than the screen it is folded by the terminal, and loses nothing
        screen.width = max(screen.width, screen.measure(table, options=screen.options.update(width=10_000)).maximum)
    screen.print(table, crop=False)


def figure(value: float | None) -> str:
    """A number as a cell: at most four digits that count; a dash where there is none."""
    if value is None:
        return "-"
    if value and not 1e-3 <= abs(value) < 1e4:
        return f"{value:.2e}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
