"""All cases are trained once, those of two ranks by one pair of processes, and every test reads the same results."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.cases import CASES, PROBLEMS
from tests.distributed.reference import train
from tests.distributed.samples import make_updates
from tests.distributed.training import NUM_RANKS, run_case

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 300


@pytest.fixture(scope="session")
def updates(model_folder):
    return make_updates(model_folder)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where the cases' TensorBoard files are, in folders of their names."""
    return tmp_path_factory.mktemp("invariance")


@pytest.fixture(scope="session")
def results(updates, model_folder, folder):
    """What the ranks have to say, a list by case."""
    together = [case for case in CASES if case.num_ranks == NUM_RANKS]
    (folder / "cases.pickle").write_bytes(pickle.dumps((together, updates, model_folder)))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks, num_threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have: rounding may depend on it
    try:
        for rank in range(NUM_RANKS):
            command = [sys.executable, "-m", "tests.distributed.rank", str(rank), str(folder)]
            with (folder / f"rank{rank}.txt").open("w") as output:
                ranks.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
                )
        found = {case: [run_case(case, updates, model_folder, folder)] for case in CASES if case.num_ranks == 1}
        for rank, process in enumerate(ranks):
            status = process.wait(timeout=LIMIT_SECONDS)
            assert status == 0, (folder / f"rank{rank}.txt").read_text()[-5000:]
    finally:
        torch.set_num_threads(num_threads)
        for process in ranks:
            process.kill()
            process.wait()
    of_ranks = [pickle.loads((folder / f"rank{rank}.pickle").read_bytes()) for rank in range(NUM_RANKS)]
    return found | {case: [of_rank[case] for of_rank in of_ranks] for case in together}


@pytest.fixture(scope="session")
def references(updates, model_folder):
    """The results in float64, by problem."""
    return {name: train(model_folder, problem, updates) for name, problem in PROBLEMS.items()}
