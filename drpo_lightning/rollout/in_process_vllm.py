"""vLLM in this process, be it the trainer's or one of the engine's own."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from drpo_lightning.batch import Completion, Sampling
from drpo_lightning.rollout.engine import EngineError
from drpo_lightning.rollout.heap import give_back_freed_memory
from drpo_lightning.rollout.randomness import OwnRandomness
from drpo_lightning.rollout.served import Heartbeat


class InProcessVLLM:
    """vLLM's engine in this process.

    Args:
        llm_kwargs: arguments of `vllm.LLM`.
        heartbeat: beats at every step of generation.
    """

    def __init__(self, llm_kwargs: dict[str, Any], heartbeat: Heartbeat | None = None) -> None:
        self._own_randomness = OwnRandomness()
        with self._own_randomness():
            from vllm import LLM

            self._llm = LLM(**llm_kwargs)
        if heartbeat is not None:
            _beat_at_every_step(self._llm.llm_engine, heartbeat)
        self._adapter: Any = None

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
        """See `RolloutEngine.generate`."""
        from vllm import SamplingParams, TokensPrompt

        parameters = [
            SamplingParams(
                n=num_samples,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                max_tokens=sampling.max_tokens,
                stop_token_ids=list(stop_token_ids),
                ignore_eos=True,  # `stop_token_ids` are the only tokens that stop
                logprobs=num_topk,
                flat_logprobs=True,
                detokenize=False,
                seed=None if seeds is None else seeds[i],
            )
            for i in range(len(prompt_ids))
        ]
        prompts = [TokensPrompt(prompt_token_ids=list(ids)) for ids in prompt_ids]
        with self._own_randomness():
            outputs = self._llm.generate(prompts, parameters, use_tqdm=False, lora_request=self._adapter)
        if not torch.cuda.is_available():
            give_back_freed_memory()
        _check_prompts(outputs, prompt_ids)
        return [
            [_completion(sample, num_topk) for sample in sorted(output.outputs, key=lambda sample: sample.index)]
            for output in outputs
        ]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See `RolloutEngine.load_weights`."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self._reset_prefix_cache()

    def load_adapter(self, folder: str) -> None:
        """Loads the adapters in a folder in place of those that were loaded before."""
        from vllm.lora.request import LoRARequest

        # A request that says `load_inplace` would read the folder again at every step of generation.
        if not self._llm.llm_engine.add_lora(LoRARequest("policy", 1, folder, load_inplace=True)):
            raise EngineError("vLLM did not load the adapters")
        self._adapter = LoRARequest("policy", 1, folder)
        self._reset_prefix_cache()

    def _reset_prefix_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise EngineError("the prefix cache could not be reset: requests of an earlier rollout hold its blocks")

    def sleep(self) -> None:
        """Frees the KV cache and moves the weights to the host's memory."""
        self._llm.sleep(level=1)

    def wake(self) -> None:
        """Undoes `sleep`."""
        self._llm.wake_up()

    def close(self) -> None:
        """Ends the engine."""
        self._llm.llm_engine.engine_core.shutdown()


def _beat_at_every_step(engine: Any, heartbeat: Heartbeat) -> None:  # noqa: ANN401
    """Shows progress whenever vLLM begins to compute the next token of each running sequence."""
    step = engine.step

    def beating_step() -> Any:  # noqa: ANN401
        heartbeat.beat()
        return step()

    engine.step = beating_step


def _check_prompts(outputs: Sequence[Any], prompt_ids: Sequence[Sequence[int]]) -> None:
    """Raises `EngineError` unless each of vLLM's `RequestOutput`s continues the prompt in its place."""
    if len(outputs) != len(prompt_ids):
        raise EngineError(f"vLLM answered {len(outputs)} of {len(prompt_ids)} requests")
    for number, (output, ids) in enumerate(zip(outputs, prompt_ids, strict=True)):
        if list(output.prompt_token_ids) != list(ids):
            raise EngineError(
                f"vLLM did not continue the prompt of request {number}, which ends with tokens {list(ids)[-5:]}, but "
                f"one that ends with {list(output.prompt_token_ids)[-5:]}"
            )


def _completion(sample: Any, num_topk: int) -> Completion:  # noqa: ANN401
    """Our completion from vLLM's `CompletionOutput`: at each place the sampled token's logprob, then the top K."""
    if sample.finish_reason not in ("stop", "length"):
        raise EngineError(f"vLLM ended a completion with {sample.finish_reason!r} instead of `stop` or `length`")
    token_ids = list(sample.token_ids)
    shape = (len(token_ids), -1)
    ids = torch.tensor(sample.logprobs.token_ids).view(shape)
    logprobs = torch.tensor(sample.logprobs.logprobs).view(shape)
    if ids[:, 0].tolist() != token_ids:
        raise EngineError("vLLM returned logprobs of other tokens than it sampled")
    topk = {"topk_ids": ids[:, 1:].clone(), "topk_logprobs": logprobs[:, 1:].clone()} if num_topk else {}
    return Completion(token_ids, logprobs[:, 0].tolist(), sample.finish_reason, **topk)
