"""vLLM's requests, computed step by step: others may come, and weights change, while some are in flight."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from drpo_lightning.batch import Completion
from drpo_lightning.rollout.engine import EngineError, Request


class _InFlight(NamedTuple):
    """A request that vLLM works on.

    Attributes:
        request: what is asked for.
        id: what vLLM calls it.
        weights_version: of the weights when it began; None if it cannot outlive them.
    """

    request: Request
    id: str
    weights_version: int | None


class VLLMRequests:
    """The requests that a vLLM engine in this process works on.

    Args:
        engine: vLLM's `LLMEngine`.
    """

    def __init__(self, engine: Any) -> None:  # noqa: ANN401
        self.adapter: Any = None
        """vLLM's `LoRARequest` for the requests that begin; None without adapters."""
        self._engine = engine
        self._names = map(str, itertools.count())
        self._in_flight: dict[str, _InFlight] = {}
        self._finished: dict[str, list[Completion]] = {}

    @property
    def are_in_flight(self) -> bool:
        """True while a request has not finished."""
        return bool(self._in_flight)

    def begin(self, requests: Iterable[Request], weights_version: int | None = None) -> list[str]:
        """Hands requests to vLLM, and gives each a name.

        Args:
            requests: what is asked for.
            weights_version: number of the weights that vLLM has, which the completions are to carry.
        """
        names = []
        for request in requests:
            names.append(next(self._names))
            self._begin(names[-1], request, weights_version)
        return names

    def _begin(self, name: str, request: Request, weights_version: int | None) -> None:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            n=request.num_samples,
            temperature=request.sampling.temperature,
            top_p=request.sampling.top_p,
            top_k=request.sampling.top_k,
            max_tokens=request.sampling.max_tokens,
            stop_token_ids=list(request.stop_token_ids),
            ignore_eos=True,  # `stop_token_ids` are the only tokens that stop
            logprobs=request.num_topk,
            flat_logprobs=True,
            detokenize=False,
            seed=request.seed,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = TokensPrompt(prompt_token_ids=list(request.prompt_ids))
        # vLLM makes the name unique: what it returns is what it ends a request by, with all its samples.
        own_id = self._engine.add_request(name, prompt, parameters, lora_request=self.adapter)
        self._in_flight[name] = _InFlight(request, own_id, weights_version)

    def step(self) -> None:
        """Computes the next token of each running sequence."""
        for output in self._engine.step():
            if output.finished:
                begun = self._in_flight.pop(output.request_id)
                self._finished[output.request_id] = _completions(output, begun)

    def finish(self, names: Sequence[str]) -> None:
        """Computes on until some requests have finished."""
        awaited = set(names)
        while not self._finished.keys() >= awaited:
            if not self._in_flight:
                raise EngineError("vLLM has not answered all requests")
            self.step()

    def has_finished(self, name: str) -> bool:
        """True if the completions of a request are there to be taken."""
        return name in self._finished

    def take(self, name: str) -> list[Completion]:
        """Hands over the completions of a request that has finished."""
        return self._finished.pop(name)

    def begin_anew(self, weights_version: int) -> None:
        """Ends the requests in flight and begins them again, with the weights and adapters that vLLM has now.

        Args:
            weights_version: number of those weights.
        """
        begun = dict(self._in_flight)
        self._engine.abort_request([request.id for request in begun.values()], internal=True)
        for name, request in begun.items():
            self._begin(name, request.request, weights_version)


def _completions(output: Any, begun: _InFlight) -> list[Completion]:  # noqa: ANN401
    """Our completions from vLLM's `RequestOutput`."""
    ids = list(begun.request.prompt_ids)
    if list(output.prompt_token_ids) != ids:
        raise EngineError(
            f"vLLM did not continue the prompt of request {begun.request.number}, which ends with tokens {ids[-5:]}, "
            f"but one that ends with {list(output.prompt_token_ids)[-5:]}"
        )
    samples = sorted(output.outputs, key=lambda sample: sample.index)
    return [_completion(sample, begun.request.num_topk, begun.weights_version) for sample in samples]


def _completion(sample: Any, num_topk: int, weights_version: int | None) -> Completion:  # noqa: ANN401
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
    return Completion(token_ids, logprobs[:, 0].tolist(), sample.finish_reason, **topk, weights_version=weights_version)
