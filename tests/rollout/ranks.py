"""Real ranks for tests: processes that talk by gloo and run what they are sent."""

import os
import pickle
import traceback
from multiprocessing import get_context

import torch
from torch import distributed as dist

WORLD = 3
PRELOADED = ["drpo_lightning.callbacks", "drpo_lightning.datamodules", "drpo_lightning.modules", "transformers"]
"""Imported once, for all ranks that are ever started."""


class Ranks:
    """Processes with a process group, each of which runs the functions it is sent."""

    def __init__(self, folder):
        context = get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        pipes = [context.Pipe() for _ in range(WORLD)]
        self.connections = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=serve, args=(rank, f"file://{folder}/store", theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()

    def __call__(self, function, *args, timeout_seconds=25):
        """The result of `function(*args)` in each rank, or its exception, or `dead`."""
        for connection in self.connections:
            connection.send((function, args))
        return [self.receive(rank, timeout_seconds) for rank in range(WORLD)]

    def receive(self, rank, timeout_seconds):
        if not self.connections[rank].poll(timeout_seconds):
            self.close()
            raise TimeoutError(f"rank {rank} hangs")
        try:
            return pickle.loads(self.connections[rank].recv_bytes())
        except EOFError:
            return "dead"

    def are_alive(self):
        return all(process.is_alive() for process in self.processes)

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()


def serve(rank, store, connection):
    """Main function of a rank."""
    os.environ |= {"LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    while True:
        function, args = connection.recv()
        try:
            answer = function(*args)
        except Exception as error:  # noqa: BLE001 - it is the test's to judge
            traceback.print_exc()
            answer = error
        connection.send_bytes(pickle.dumps(answer))
