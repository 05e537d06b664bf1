"""The optimizer's state in the host's memory while the engine samples."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class OptimizerOffload:
    """Moves the states of optimizers to the host and back; the tensors stay the same, without their storage meanwhile.

    The memory on the host, pinned for a GPU, is kept for the next time.
    """

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    @contextmanager
    def offloaded(
        self,
        optimizers: Iterable[Optimizer],
        device: torch.device,
        timed: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Iterator[None]:
        """Frees what the states take on a device, and brings it back at the end, after an exception too.

        Args:
            optimizers: whose states are moved: every tensor but single numbers; of a sharded one this rank's part.
            device: where they are.
            timed: makes a block for each of the two ways.
        """
        with timed():
            storages = self._move_out(optimizers, device)
        try:
            yield
        finally:
            with timed():
                for storage, buffer in zip(storages, self._buffers, strict=True):
                    storage.resize_(buffer.numel())
                    _bytes_of(storage, device).copy_(buffer)

    def _move_out(self, optimizers: Iterable[Optimizer], device: torch.device) -> list[torch.UntypedStorage]:
        """Copies the states to the host and frees them; returns what they were in."""
        storages = [tensor.untyped_storage() for tensor in _large_states(optimizers, device)]
        sizes = [storage.nbytes() for storage in storages]
        if [buffer.numel() for buffer in self._buffers] != sizes:
            pinned = device.type == "cuda"
            self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes]
        for storage, buffer in zip(storages, self._buffers, strict=True):
            buffer.copy_(_bytes_of(storage, device))
            storage.resize_(0)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return storages


def _large_states(optimizers: Iterable[Optimizer], device: torch.device) -> list[Tensor]:
    """The tensors of the states on a device, single numbers apart; a storage comes once."""
    tensors = {}
    for optimizer in optimizers:
        for state in optimizer.state.values():
            for value in state.values():
                local = value.to_local() if isinstance(value, DTensor) else value
                if isinstance(local, Tensor) and local.device == device and local.numel() > 1:
                    tensors[local.untyped_storage().data_ptr()] = local
    return list(tensors.values())


def _bytes_of(storage: torch.UntypedStorage, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
