"""The command `drpo report`."""

import sys
from pathlib import Path

from drpo_lightning.errors import SettingError
from drpo_lightning.report.page import report_page
from drpo_lightning.report.runs import read_runs


def write_report(folders: list[str], file: str) -> int:
    """Compares the runs below some folders in one HTML page that needs nothing else.

    Args:
        folders: each a run's log folder, or any folder above some.
        file: HTML file to write.

    Returns:
        The number of runs.

    Raises:
        SettingError: if a folder is missing, broken or without a run, or the page cannot be written.
    """
    runs = read_runs(folders)
    try:
        Path(file).write_text(report_page(runs), encoding="utf-8")
    except OSError as error:
        raise SettingError(f"the report cannot be written to {file!r}: {error.strerror}") from error
    return len(runs)


def main(arguments: list[str]) -> None:
    """`drpo report LOGDIR [LOGDIR ...] --out FILE`."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="drpo report", description="Compares runs in one HTML page.")
    parser.add_argument("logdir", nargs="+", type=str, help="log folder of a run, or a folder with several below it")
    parser.add_argument("--out", type=str, default="report.html", help="HTML file to write")
    config = parser.parse_args(arguments)
    try:
        count = write_report(config.logdir, config.out)
    except SettingError as error:
        print(f"drpo: error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    print(f"{count} run{'' if count == 1 else 's'} in {config.out}")  # noqa: T201
