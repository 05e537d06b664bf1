"""vLLM in this process, be it the trainer's or one of the engine's own."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from drpo_lightning.batch import Completion, Sampling
from drpo_lightning.rollout.engine import EngineError, InFlight, Request
from drpo_lightning.rollout.heap import give_back_freed_memory
from drpo_lightning.rollout.randomness import OwnRandomness
from drpo_lightning.rollout.served import Heartbeat
from drpo_lightning.rollout.vllm_requests import VLLMRequests
from drpo_lightning.rollout.vllm_weights import load_weights, loads_in_place


class InProcessVLLM:
    """vLLM's engine in this process.

    Args:
        llm_kwargs: arguments of `vllm.LLM`.
        heartbeat: beats at every step of generation, in a process of the engine's own; None in the trainer's.
    """

    def __init__(self, llm_kwargs: dict[str, Any], heartbeat: Heartbeat | None = None) -> None:
        self._own_randomness: Callable[[], AbstractContextManager[None]] = (
            nullcontext if heartbeat is not None else OwnRandomness()
        )
        with self._own_randomness():
            from vllm import LLM

            self._llm = LLM(**llm_kwargs)
        if heartbeat is not None:
            _beat_at_every_step(self._llm.llm_engine, heartbeat)
        self._requests = VLLMRequests(self._llm.llm_engine)
        self._loads_in_place = loads_in_place(self._llm)
        self._weights_version = 0
        self._submitted: dict[int, str] = {}
        """Names of the requests of `submit` by their numbers, until their completions are taken."""

    def properties(self) -> tuple[int, int, str]:
        """Tokens of the context, tokens of one block of the prefix cache (0 if it is off), and the precision."""
        config = self._llm.llm_engine.vllm_config
        block = config.cache_config.block_size if config.cache_config.enable_prefix_caching else 0
        precision = config.model_config.quantization or str(config.model_config.dtype).removeprefix("torch.")
        return config.model_config.max_model_len, block, precision

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        num_samples: int,
        stop_token_ids: Sequence[int],
        seeds: Sequence[int] | None,
        num_topk: int,
    ) -> list[list[Completion]]:
        """See `RolloutEngine.generate`; submitted requests go on meanwhile."""
        settings = (sampling, num_samples, stop_token_ids)
        requests = (
            Request(number, ids, *settings, None if seeds is None else seeds[number], num_topk)
            for number, ids in enumerate(prompt_ids)
        )
        with self._own_randomness():
            names = self._requests.begin(requests)
            self._requests.finish(names)
        _give_back_memory()
        return [self._requests.take(name) for name in names]

    def submit(self, requests: Sequence[Request]) -> None:
        """See `RolloutEngine.submit`."""
        names = self._requests.begin(requests, self._weights_version)
        self._submitted |= {request.number: name for request, name in zip(requests, names, strict=True)}

    def work(self) -> bool:
        """Computes a token of each running sequence; False if there is none."""
        if not self._requests.are_in_flight:
            return False
        with self._own_randomness():
            self._requests.step()
        return True

    def collect(self, numbers: Sequence[int]) -> dict[int, list[Completion]]:
        """See `RolloutEngine.collect`."""
        with self._own_randomness():
            self._requests.finish([self._submitted[number] for number in numbers])
        _give_back_memory()
        return self._take(numbers)

    def finished(self) -> dict[int, list[Completion]]:
        """See `RolloutEngine.finished`."""
        return self._take([number for number, name in self._submitted.items() if self._requests.has_finished(name)])

    def _take(self, numbers: Sequence[int]) -> dict[int, list[Completion]]:
        return {number: self._requests.take(self._submitted.pop(number)) for number in numbers}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int, in_flight: InFlight) -> None:
        """See `RolloutEngine.load_weights`.

        Args:
            weights: name and tensor.
            version: their number, see `RolloutEngine.weights_version`.
            in_flight: what becomes of unfinished requests, see `RolloutEngine.sample_ahead`.
        """
        load_weights(self._llm, weights, in_place=self._loads_in_place)
        self._go_on(version, in_flight)

    def load_adapter(self, folder: str, version: int, in_flight: InFlight) -> None:
        """Loads the adapters in a folder in place of those that were loaded before; see `load_weights`."""
        from vllm.lora.request import LoRARequest

        # A request that says `load_inplace` would read the folder again at every step of generation.
        if not self._llm.llm_engine.add_lora(LoRARequest("policy", 1, folder, load_inplace=True)):
            raise EngineError("vLLM did not load the adapters")
        self._requests.adapter = LoRARequest("policy", 1, folder)
        self._go_on(version, in_flight)

    def _go_on(self, version: int, in_flight: InFlight) -> None:
        """Lets requests go on with new weights: none reads what is cached of older ones, of itself or of others."""
        self._weights_version = version
        if in_flight == "drop":
            self._requests.begin_anew(version)
        # A running request is put back to where nothing of it is computed yet; its tokens stay.
        if not self._llm.reset_prefix_cache(reset_running_requests=True):
            raise EngineError("the prefix cache could not be reset: requests of an earlier rollout hold its blocks")

    def sleep(self) -> None:
        """Frees the KV cache and the weights, which the trainer has; those that it does not bring go to the host."""
        self._llm.sleep(level=2 if self._loads_in_place else 1)

    def wake(self) -> None:
        """Undoes `sleep`."""
        self._llm.wake_up()

    def close(self) -> None:
        """Ends the engine."""
        self._llm.llm_engine.engine_core.shutdown()


def _give_back_memory() -> None:
    if not torch.cuda.is_available():
        give_back_freed_memory()


def _beat_at_every_step(engine: Any, heartbeat: Heartbeat) -> None:  # noqa: ANN401
    """Shows progress whenever vLLM begins to compute the next token of each running sequence."""
    step = engine.step

    def beating_step() -> Any:  # noqa: ANN401
        with heartbeat.beating():
            return step()

    engine.step = beating_step
