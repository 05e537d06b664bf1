"""Several nodes, as torchrun and SLURM start them: here two processes on one machine that take each other for one."""

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def torchrun(rank, port):
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}"]
    return [*command, "--master-addr=127.0.0.1", f"--master-port={port}", "-m", "drpo_lightning"], {}


def slurm(rank, port):
    job = {"JOB_ID": 7, "JOB_NAME": "drpo", "JOB_NODELIST": "localhost", "NNODES": 2, "NTASKS": 2, "NTASKS_PER_NODE": 1}
    task = {**job, "PROCID": rank, "NODEID": rank, "LOCALID": 0}
    environment = {f"SLURM_{name}": str(value) for name, value in task.items()}
    return [sys.executable, "-m", "drpo_lightning"], environment | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@pytest.mark.parametrize("launch", [torchrun, pytest.param(slurm, marks=pytest.mark.reliability)])
def test_two_nodes_make_one_run(launch, tmp_path):
    port = free_port()
    arguments = ["fit", "--config=configs/quickstart.yaml", "--data.engine=drpo_lightning.rollout.TransformersEngine"]
    arguments += ["--trainer.accelerator=cpu", "--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.strategy=ddp"]
    arguments += ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={tmp_path}", "--trainer.max_epochs=1"]
    arguments += [f"--trainer.default_root_dir={tmp_path}", "--trainer.limit_val_batches=0", "--data.num_prompts=8"]
    arguments += ["--trainer.enable_progress_bar=false", "--data.num_updates=1"]
    processes = []
    try:
        for rank in range(2):
            command, environment = launch(rank, port)
            processes.append(
                subprocess.Popen(
                    [*command, *arguments],
                    cwd=ROOT,
                    env={**os.environ, **environment, "OMP_NUM_THREADS": "1"},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], printed[0][-2000:] + printed[1][-2000:]
    assert (
        "8 prompts x 8 samples = 64 completions -> 1 updates of 64, each in 1 micro-batches of about 32 on 2"
        in printed[0]
    )
    assert "logs: " in printed[0]
    assert "logs: " not in printed[1], "one rank reports"
    with next(tmp_path.glob("**/metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    assert sum(bool(row.get("optim/loss")) for row in rows) == 1
    assert float(next(row["rollout/number"] for row in rows if row.get("rollout/number"))) == 1
