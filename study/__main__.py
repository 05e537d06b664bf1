"""`python -m study`: makes the runs that are not in the results file yet."""

import argparse
import os
import time
from pathlib import Path

from study.grid import evaluation_runs, tuned_rates, tuning_runs
from study.pool import make, read_rows
from study.run import execute

RESULTS = Path(__file__).parent / "results.jsonl"


def main() -> None:
    """Tuning first, since the other runs take their learning rates from it."""
    parser = argparse.ArgumentParser(prog="python -m study", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="rows are read from here and added to it")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="runs at a time, one core each")
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="starts no run after so long")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    deadline = time.time() + arguments.max_seconds
    if make(execute, tuning_runs(), arguments.results, arguments.workers, deadline):
        rates = tuned_rates(read_rows(arguments.results))
        make(execute, evaluation_runs(rates), arguments.results, arguments.workers, deadline)


if __name__ == "__main__":
    main()
