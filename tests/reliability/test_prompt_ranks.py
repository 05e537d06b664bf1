"""A mixture with a curriculum and dynamic sampling takes the same prompts on any ranks, also after a checkpoint."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.reliability

SCRIPT = Path(__file__).parent / "prompt_ranks.py"


def launch(folder, num_ranks, *arguments):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}"]
    command += ["--master-addr=127.0.0.1", f"--master-port={port}", str(SCRIPT), str(folder), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    result = subprocess.run(command, env=environment, check=False, timeout=300, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return torch.load(folder / f"{arguments[0]}.pt")


def test_the_prompts_do_not_depend_on_the_ranks(tmp_path):
    one = launch(tmp_path, 1, "one")
    two = launch(tmp_path, 2, "two")
    assert one["prompts"] == two["prompts"]
    assert one["schedule"] == two["schedule"]
    assert one["schedule"]["position"] > 24  # some were left out
    assert one["figures"] == two["figures"]
    assert one["dynamic_sampling"] == two["dynamic_sampling"]
    assert sum(figures["rounds"] for figures in one["dynamic_sampling"]) > 1
    resumed = launch(tmp_path, 1, "resumed", "two.ckpt")
    assert resumed["prompts"] == one["prompts"][3:]
    assert resumed["schedule"] == one["schedule"]
