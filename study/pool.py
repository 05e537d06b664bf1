"""Runs side by side, one core each, with a file of rows that grows as they end."""

import json
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from study.grid import Run


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a results file, each run once."""
    lines = file.read_text().splitlines() if file.exists() else []
    return list({row["key"]: row for row in map(json.loads, lines)}.values())


def _end_with_parent() -> None:
    """Ends a worker whose parent is gone: it would otherwise finish its run for nobody, and wait for ever."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None, "a worker has a parent"
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def make(
    execute: Callable[[Run], dict[str, Any]],
    runs: Iterable[Run],
    results: Path,
    workers: int,
    deadline: float,
    *,
    fresh_processes: bool = False,
) -> bool:
    """Makes the runs that have no row yet; none is started after the deadline.

    Args:
        execute: makes a run and its row.
        runs: those that are wanted.
        results: rows are added to it.
        workers: runs at a time.
        deadline: in seconds since the epoch.
        fresh_processes: whether every run gets a process of its own.

    Returns:
        True if all runs have a row afterwards. A run that fails is reported, and left without one.
    """
    done = {row["key"] for row in read_rows(results)}
    missing = [run for run in runs if run.key not in done]
    results.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    context = multiprocessing.get_context("spawn")
    per_process = 1 if fresh_processes else None
    with (
        ProcessPoolExecutor(workers, context, _end_with_parent, max_tasks_per_child=per_process) as pool,
        results.open("a") as file,
    ):
        running: set[Future[dict[str, Any]]] = set()
        while running or (missing and time.time() < deadline):
            while missing and len(running) < workers and time.time() < deadline:
                running.add(pool.submit(execute, missing.pop(0)))
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                if error := future.exception():
                    failed += 1
                    traceback.print_exception(error)
                    continue
                row = future.result()
                file.write(json.dumps(row) + "\n")
                file.flush()
                print(f"{row['final']:.3f} {row['area']:.3f} {row['seconds']:6.1f} s  {row['key']}", flush=True)
    return not missing and not failed
