"""One of the processes that train together: `python -m tests.distributed.rank NUMBER FOLDER`."""

import pickle
import sys
from pathlib import Path

from tests.distributed.training import run_rank

if __name__ == "__main__":
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    cases, updates, model_folder = pickle.loads((folder / "cases.pickle").read_bytes())
    results = run_rank(rank, cases, updates, model_folder, folder)
    (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(results))
