"""The trainer's weights on their way to an engine."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class WeightSource(ABC):
    """What weights are taken from: the LightningModule that owns the policy."""

    @abstractmethod
    def weight_shapes(self) -> dict[str, torch.Size]:
        """Name and full shape of every tensor that `named_weights` yields."""

    @abstractmethod
    def weights_are_finite(self) -> bool:
        """True if no weight on any rank is NaN or infinite. Collective: every rank calls it."""

    @abstractmethod
    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every tensor of the model's state dict, tied ones under each of their names, unsharded and detached.

        Adapters are merged into the weights that they belong to. Collective: every rank iterates to the end. A tensor
        is valid until the next one is asked for.
        """

    @property
    def adapter_config(self) -> dict[str, Any] | None:
        """Content of PEFT's `adapter_config.json` if the adapters alone are synced; None if all weights are."""
        return None

    def named_adapter_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every factor of the adapters under its name in PEFT's file, as `named_weights` yields weights.

        Collective, too.
        """
        raise NotImplementedError(f"{type(self).__name__} has no adapters")


class RepeatableWeights(Iterable[tuple[str, Tensor]]):
    """Weights that are gathered anew each time that they are iterated over.

    Args:
        gather: begins to gather them, as `WeightSource.named_weights`.
    """

    def __init__(self, gather: Callable[[], Iterator[tuple[str, Tensor]]]) -> None:
        self._gather = gather

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._gather()


class WeightStream(Iterator[tuple[str, Tensor]]):
    """Weights on their way to an engine; keeps none, and tells a failure of their source from one of the engine."""

    def __init__(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self._weights = iter(weights)
        self._error: Exception | None = None

    def __next__(self) -> tuple[str, Tensor]:
        try:
            return next(self._weights)
        except StopIteration:
            raise
        except Exception as error:
            self._error = error
            raise

    def drain(self) -> None:
        """Takes what is left, since gathering it is collective. Raises what the source has raised."""
        if self._error is not None:
            raise self._error
        deque(self, maxlen=0)


def model_weight_shapes(model: str, *, trust_remote_code: bool = False) -> dict[str, torch.Size]:
    """Name and shape of every tensor of a causal language model's state dict, without loading its weights.

    Args:
        model: folder or name on the Hugging Face hub.
        trust_remote_code: whether code that comes with the model may run.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return {name: tensor.shape for name, tensor in twin.state_dict().items()}


def check_weights(offered: Mapping[str, torch.Size], expected: Mapping[str, torch.Size]) -> None:
    """Checks that a set of weights is complete and fits, before any of it is sent.

    Engines do not: a missing tensor leaves a silently wrong model, a wrong shape a broken one.

    Args:
        offered: name and shape of the tensors to be sent.
        expected: name and shape of the tensors of the engine's model.

    Raises:
        ValueError: naming the tensors that are missing, unknown or of another shape.
    """
    problems = [f"missing: {name}" for name in expected.keys() - offered.keys()]
    problems += [f"unknown: {name}" for name in offered.keys() - expected.keys()]
    problems += [
        f"shape of {name}: {list(offered[name])} instead of {list(expected[name])}"
        for name in offered.keys() & expected.keys()
        if tuple(offered[name]) != tuple(expected[name])
    ]
    if problems:
        raise ValueError(
            f"the trainer's weights do not fit the engine's model ({len(problems)} problems): "
            + "; ".join(sorted(problems)[:5])
            + ". Do trainer and engine load the same model?"
        )
