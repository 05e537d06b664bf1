"""The interface that every rollout engine has."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from drpo_lightning.batch import Completion, Sampling
from drpo_lightning.errors import SettingError

SleepMode = Literal["auto", "always", "never"]
InFlight = Literal["continue", "drop"]
"""What becomes of the requests that are in flight when weights are loaded, see `RolloutEngine.sample_ahead`."""


class EngineError(RuntimeError):
    """An engine did not start, did not answer in time, or is gone."""


class WaitEnded(Exception):  # noqa: N818 - nothing has gone wrong
    """An engine has stopped waiting, since the run is to end."""


class Request(NamedTuple):
    """What `RolloutEngine.submit` is asked for: the completions of one prompt.

    Attributes:
        number: tells the request from others.
        prompt_ids: token ids of the prompt.
        sampling: how completions are drawn.
        num_samples: how many.
        stop_token_ids: tokens that end a completion; they are part of it.
        seed: see `RolloutEngine.generate`.
        num_topk: likewise.
    """

    number: int
    prompt_ids: Sequence[int]
    sampling: Sampling
    num_samples: int
    stop_token_ids: Sequence[int]
    seed: int | None = None
    num_topk: int = 0


class RolloutEngine(ABC):
    """Samples completions with a copy of the trainer's weights.

    The constructor only keeps settings: nothing is loaded before `start`, since every rank builds the object before
    the ranks know of each other.

    Args:
        sleep: whether the engine gives its memory to the trainer between rollouts: `always` is an error where the
            engine cannot, `auto` does so where it can, `never` leaves it as it is.

    Attributes:
        cache_block_tokens: tokens of one block of the prefix cache; 0 without one.
        context_setting: what a user raises for a longer context, in words.
        context_tokens: most tokens of a sequence; known once started.
        dtype_name: precision of the engine's weights, `float32`, `bfloat16`, `fp8` and so on; known once started.
        is_run_to_end: says whether what the engine waits for has no use any more; asked in any thread.
        is_shared: True for one that all ranks ask, each for itself, without a copy of it for each.
        max_context_tokens: most tokens of a sequence as configured; None leaves it to the model.
        max_restarts: failures in a row after which it is started again; 0 where it cannot be, as in the trainer's
            process.
        num_restarts: times that it was started again since it was first started.
        timeout_seconds: the longest that a call should take.
        weights_version: number of the weights that are loaded next, which the completions of `collect` carry.
    """

    cache_block_tokens: int = 0
    context_setting: str = "`max_position_embeddings` in the model's configuration"
    context_tokens: int = 0
    dtype_name: str = ""
    is_run_to_end: Callable[[], bool] = bool
    is_shared: bool = False
    max_context_tokens: int | None = None
    max_restarts: int = 0
    num_restarts: int = 0
    timeout_seconds: float = 3600.0
    weights_version: int = 0

    def __init__(self, sleep: SleepMode = "auto") -> None:
        self.sleep_mode = sleep

    @abstractmethod
    def check_available(self) -> None:
        """Raises `SettingError` if what the engine needs is not installed. Cheap: nothing is loaded."""

    def describe(self) -> str:
        """One line for the start of a run."""
        return type(self).__name__

    @property
    def statistics(self) -> dict[str, float]:
        """Figures of its own, logged as `engine/<name>` at every rollout."""
        return {}

    @property
    def sampling_seconds(self) -> float | None:
        """Seconds in which it has computed tokens so far, whoever waits for them; None if it does not know.

        May be asked at any time. It never becomes less, not by a restart either.
        """
        return None

    @property
    @abstractmethod
    def is_started(self) -> bool:
        """True between `start` and `close`."""

    @abstractmethod
    def start(
        self,
        model: str,
        *,
        device: torch.device,
        num_ranks: int,
        seed: int,
        trust_remote_code: bool = False,
        adapter_rank: int | None = None,
    ) -> None:
        """Loads the model and makes ready to generate.

        Args:
            model: folder or name on the Hugging Face hub.
            device: the trainer's device on this rank.
            num_ranks: processes of the trainer.
            seed: seeds requests that have no seed of their own.
            trust_remote_code: whether code that comes with the model may run.
            adapter_rank: rank of the adapters that `load_adapter` will bring; None if it will not be called.

        Raises:
            EngineError: if the engine does not come up.
            WaitEnded: if the run is to end before.
        """

    @abstractmethod
    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        num_samples: int,
        stop_token_ids: Sequence[int],
        seeds: Sequence[int] | None = None,
        num_topk: int = 0,
    ) -> list[list[Completion]]:
        """Samples `num_samples` completions of each prompt.

        Args:
            prompt_ids: token ids of each prompt.
            sampling: how completions are drawn.
            num_samples: completions per prompt, different from each other.
            stop_token_ids: tokens that end a completion; they are part of it.
            seeds: one seed per prompt, below 2^62; equal seeds and weights give equal completions. None draws anew.
            num_topk: how many of the most likely tokens at each place are returned with their logprobs, most likely
                first; -1 for the whole vocabulary.

        Returns:
            For each prompt its completions, with logprobs of the distribution that was sampled from.
        """

    def sample_ahead(self, in_flight: InFlight) -> None:  # noqa: ARG002
        """Asks, before `start`, for an engine that samples while the trainer trains: one with `submit`.

        Args:
            in_flight: what becomes of the requests that have not finished when weights are loaded. `continue`: they
                are interrupted between two tokens, all that is cached of them is computed anew, and the tokens to come
                are drawn with the new weights. `drop`: what they have is thrown away, and they begin anew.

        Raises:
            SettingError: if the engine cannot.
        """
        raise SettingError(
            f"`data.max_staleness` must be 0 with {type(self).__name__}, which does not sample while the trainer "
            "trains; set `data.engine: drpo_lightning.rollout.VLLMEngine`, in a process of its own for each rank, or "
            "drpo_lightning.rollout.VLLMServerEngine"
        )

    def submit(self, requests: Sequence[Request]) -> None:
        """Begins to sample, and returns at once. Of engines that `sample_ahead`."""
        raise NotImplementedError(f"{type(self).__name__} does not sample ahead")

    def collect(self, numbers: Sequence[int]) -> dict[int, list[Completion]]:
        """Waits for the completions of some of the submitted requests, and takes them.

        Args:
            numbers: of the requests.

        Returns:
            Of each request the completions, each with the number of the oldest weights that a token of it can have been
            drawn with (`weights_version`).
        """
        raise NotImplementedError(f"{type(self).__name__} does not sample ahead")

    def finished(self) -> dict[int, list[Completion]]:
        """Takes the completions of the submitted requests that have finished, without waiting, as `collect` does."""
        raise NotImplementedError(f"{type(self).__name__} does not sample ahead")

    @abstractmethod
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces all weights and forgets every cached prefix.

        A failure leaves the engine unusable: it must be closed.

        Args:
            weights: name and tensor of the model's whole state dict, tied tensors under each of their names.
        """

    @property
    def supports_adapters(self) -> bool:
        """True if the engine has `load_adapter`."""
        return False

    def load_adapter(self, config: Mapping[str, Any], weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces the adapters by others, over the weights the engine has, and forgets every cached prefix.

        The weights are those it started with, or that `load_weights` brought since. A failure leaves the engine
        unusable: it must be closed.

        Args:
            config: content of PEFT's `adapter_config.json`.
            weights: name and tensor of every A and B, as in PEFT's file.
        """
        raise NotImplementedError(f"{type(self).__name__} has no adapters")

    @property
    @abstractmethod
    def can_sleep(self) -> bool:
        """True if the engine can give its memory back; known once started."""

    @abstractmethod
    def _sleep(self) -> None: ...

    @abstractmethod
    def _wake(self) -> None: ...

    @abstractmethod
    def close(self) -> None:
        """Ends the engine and frees what it holds. May be called again, and before `start`."""

    def abandon(self) -> None:
        """Ends an engine that has failed, to be started again by the same ranks."""
        self.close()

    def check_sleep(self) -> None:
        """Raises `SettingError` if `sleep: always` is asked of a started engine that cannot sleep."""
        if self.sleep_mode == "always" and not self.can_sleep:
            raise SettingError(
                f"`sleep: always` is not supported by {type(self).__name__} on this device; "
                "set `sleep: auto`, which sleeps only where it can"
            )

    @property
    def sleeps(self) -> bool:
        """True if the engine gives its memory to the trainer while that trains; known once started."""
        return self.sleep_mode != "never" and self.can_sleep

    def sleep(self) -> None:
        """Gives the engine's memory to the trainer, as far as `sleep` asks for it and the engine can."""
        self.check_sleep()
        if self.sleeps:
            self._sleep()

    def wake(self) -> None:
        """Undoes `sleep`; weights have to be loaded again before generating."""
        if self.sleeps:
            self._wake()
