"""A checkpoint loads on another number of ranks, and the run goes on as if it had always been on them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "resume_runs.py"
MOMENTS = {"between": [0, 3], "inside": [1, 2]}
"""After the last micro-batch of the first rollout, and inside the second update of the second: 2 updates of 2 each."""
SAVED = [(strategy, moment) for strategy in ("ddp", "fsdp2") for moment in MOMENTS]


def launch(folder, num_ranks, jobs):
    """Runs jobs one after the other on some ranks."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}"]
    command += ["--master-addr=127.0.0.1", f"--master-port={port}", str(SCRIPT), str(folder), json.dumps(jobs)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    result = subprocess.run(command, env=environment, check=False, timeout=600, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]


def resuming(num_ranks):
    """Jobs that go on from what two ranks have saved."""
    return [
        {"name": f"{strategy}-{moment}-on-{num_ranks}", "strategy": strategy, "resume": f"{strategy}-{moment}"}
        for strategy, moment in SAVED
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Final weights of an uninterrupted run on one rank, and of runs that two ranks saved and 1 or 2 resumed."""
    folder = tmp_path_factory.mktemp("resume")
    saving = [
        {
            "name": f"{strategy}-whole-on-2",
            "strategy": strategy,
            "micro_batches": 2,
            "save": {f"{strategy}-{name}": moment for name, moment in MOMENTS.items()},
        }
        for strategy in ("ddp", "fsdp2")
    ]
    launch(folder, 2, saving + [job | {"micro_batches": 2} for job in resuming(2)])
    launch(folder, 1, [{"name": "whole", "strategy": "ddp"}, *resuming(1)])
    return folder


def results_in(folder):
    return {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}


@pytest.fixture(scope="module")
def results(folder):
    return results_in(folder)


@pytest.fixture(scope="module")
def results_on_four(folder):
    launch(folder, 4, resuming(4))
    return results_in(folder)


def largest_difference(ours, theirs):
    assert ours["steps"] == theirs["steps"] == 6
    assert ours["epochs"] == theirs["epochs"] == 3
    assert ours["weights"].keys() == theirs["weights"].keys()
    pairs = [(ours["weights"][name], theirs["weights"][name]) for name in ours["weights"]]
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize(("strategy", "moment"), SAVED)
def test_a_run_resumed_on_one_rank_ends_where_one_without_a_break_does(results, strategy, moment):
    # The same samples in every update; ranks and micro-batches add them up in another order, in float32.
    assert largest_difference(results[f"{strategy}-{moment}-on-1"], results["whole"]) < 1e-5


@pytest.mark.reliability
@pytest.mark.parametrize(("strategy", "moment"), SAVED)
def test_a_run_resumed_on_four_ranks_ends_where_one_rank_without_a_break_does(results_on_four, strategy, moment):
    assert largest_difference(results_on_four[f"{strategy}-{moment}-on-4"], results_on_four["whole"]) < 1e-5


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_without_a_break_end_where_one_does(results, strategy):
    assert largest_difference(results[f"{strategy}-whole-on-2"], results["whole"]) < 1e-5


@pytest.mark.parametrize(("strategy", "moment"), SAVED)
def test_a_run_resumed_on_as_many_ranks_is_bitwise_the_one_without_a_break(results, strategy, moment):
    assert largest_difference(results[f"{strategy}-{moment}-on-2"], results[f"{strategy}-whole-on-2"]) == 0
