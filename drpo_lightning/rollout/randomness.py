"""Random numbers of an engine that shares the trainer's process."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy
import torch


class OwnRandomness:
    """Random number generators of vLLM's own, although Python, NumPy and PyTorch have one for the whole process.

    vLLM reseeds them when it starts and draws from them: the trainer's state is put aside meanwhile, and vLLM goes on
    from where it was the last time.
    """

    def __init__(self) -> None:
        self._states: tuple[Any, ...] | None = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """A block of code that draws from vLLM's random numbers, and leaves the trainer's as they were."""
        trainers = self._get()
        if self._states is not None:
            self._set(self._states)
        try:
            yield
        finally:
            self._states = self._get()
            self._set(trainers)

    @staticmethod
    def _get() -> tuple[Any, ...]:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return random.getstate(), numpy.random.get_state(), torch.get_rng_state(), cuda  # noqa: NPY002 - vLLM uses it

    @staticmethod
    def _set(states: tuple[Any, ...]) -> None:
        python, numpys, torchs, cuda = states
        random.setstate(python)
        numpy.random.set_state(numpys)  # noqa: NPY002
        torch.set_rng_state(torchs)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
