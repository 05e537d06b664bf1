"""Memory that the trainer and an engine in a process of its own both see: the host's, or that of their GPU."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

DEVICE_ARGUMENT = 6
"""Which argument of `rebuild_cuda_tensor` is the GPU, by the number that the sending process gives it."""


class WeightBuffer:
    """A buffer that weights travel through from the process that makes it to one that gets it when it starts.

    In the host's memory it is there all the time. On a GPU it is only while it is lent, by CUDA's inter-process
    communication, since training needs the memory; vLLM's transfer `ipc` does the same with each tensor.

    Args:
        num_bytes: its size.
        device: where it is.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._num_bytes = num_bytes
        self._device = device
        self._host: Tensor | None = None
        if device.type != "cuda":
            self._host = torch.empty(num_bytes, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def lent(self) -> Iterator[tuple[Tensor, Any]]:
        """Its bytes, and a message by which the other process finds them."""
        if self._host is not None:
            yield self._host, None
            return
        content = torch.empty(self._num_bytes, dtype=torch.uint8, device=self._device)
        yield content, reduce_tensor(content)[1]  # type: ignore[no-untyped-call]

    def borrowed(self, message: Any) -> Tensor:  # noqa: ANN401
        """Its bytes in the other process.

        Args:
            message: what came with them.
        """
        if self._host is not None:
            return self._host
        arguments = list(message)
        arguments[DEVICE_ARGUMENT] = torch.cuda.current_device()
        return rebuild_cuda_tensor(*arguments)  # type: ignore[no-untyped-call, no-any-return]


def finish_copies(buffer: Tensor) -> None:
    """Waits until what was written to or read from a buffer is: the other process goes on with it then."""
    if buffer.is_cuda:
        torch.cuda.current_stream(buffer.device).synchronize()
