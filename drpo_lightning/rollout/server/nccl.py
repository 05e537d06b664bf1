"""The trainer's end of an NCCL group with the workers of one vLLM server, without vLLM on this side.

After the example `rlhf_http_nccl_no_vllm.py` of vLLM: the group's identifier goes to the workers in the body of
`/init_weight_transfer_engine`, whose communicators begin with the sum of one number; then each tensor that
`/update_weights` announces is broadcast from rank 0. Nothing is unpickled on either side.
"""

import base64
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from drpo_lightning.rollout.server.weights import Bucket

UNIQUE_ID_KEY = "0"
"""Where PyTorch keeps the identifier of a group's first communicator in its store."""


class NCCLSender:
    """Rank 0 of a group whose other ranks are the workers of a server.

    `join` returns once the workers have been told of `init_info`, so that the two run at the same time.

    Args:
        device: the trainer's.
        num_workers: of the server.
        instance: of the server; a server that was started again has lost the group.
        timeout_seconds: for the meeting and for each broadcast.
    """

    def __init__(self, device: torch.device, num_workers: int, instance: str, timeout_seconds: float) -> None:
        self.instance = instance
        self._device = device
        self._num_ranks = 1 + num_workers
        timeout = timedelta(seconds=timeout_seconds)
        self._store = dist.HashStore()  # type: ignore[attr-defined]
        self._store.set_timeout(timeout)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        self._group: Any = dist.ProcessGroupNCCL(self._store, 0, self._num_ranks, options)

    def init_info(self) -> dict[str, Any]:
        """What the workers have to know; waits for `join` to begin."""
        identifier = base64.b64encode(self._store.get(UNIQUE_ID_KEY)).decode()
        return {"nccl_unique_id_b64": identifier, "rank_offset": 1, "world_size": self._num_ranks, "packed": False}

    def join(self) -> None:
        """Meets the workers."""
        with torch.cuda.device(self._device):
            self._group.allreduce([torch.zeros(1, device=self._device)]).wait()
            torch.cuda.synchronize()

    def send(self, bucket: Bucket) -> None:
        """Sends each tensor to all workers."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()  # the copies in the bucket were made by another thread
            for _, tensor in bucket:
                self._group.broadcast([tensor], options).wait()
            torch.cuda.synchronize()

    def close(self) -> None:
        """Leaves the group, also if workers are gone."""
        self._group.abort()
