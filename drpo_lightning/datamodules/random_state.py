"""The random number generators of a process, which Lightning does not save: a user's reward may draw from them."""

import random
from typing import Any

import numpy
import torch

RandomState = dict[str, Any]
"""States of the generators of Python, NumPy and PyTorch, as plain values and tensors."""


def random_state(device: torch.device) -> RandomState:
    """The states of this process's global generators.

    Args:
        device: that of the policy; its generator is included.
    """
    numpys: dict[str, Any] = numpy.random.get_state(legacy=False)  # noqa: NPY002 - the one that users draw from
    numpys["state"]["key"] = torch.from_numpy(numpys["state"]["key"].astype("int64"))
    state = {
        "python": random.getstate(),
        "numpy": numpys,
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: RandomState, device: torch.device) -> None:
    """Puts this process's global generators into the states of `random_state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    numpys = state["numpy"]
    keys = numpys["state"]["key"].numpy().astype("uint32")
    numpy.random.set_state({**numpys, "state": {**numpys["state"], "key": keys}})  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
