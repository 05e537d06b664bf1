"""What is said to vLLM's `/inference/v1/generate`, and what it answers: tokens in, tokens out."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from drpo_lightning.batch import Completion, Sampling

LEAST_LOGPROB = -9999.0
"""What vLLM sends in place of minus infinity and NaN, which JSON does not have."""


def generate_message(
    prompt_ids: Sequence[int],
    sampling: Sampling,
    *,
    num_samples: int,
    stop_token_ids: Sequence[int],
    seed: int | None,
    num_topk: int,
) -> dict[str, Any]:
    """The question for the completions of a prompt; the arguments are those of `RolloutEngine.generate`."""
    parameters = {
        "n": num_samples,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": list(stop_token_ids),
        "ignore_eos": True,  # `stop_token_ids` are the only tokens that stop
        # As many places as asked for, and the sampled token takes one of them.
        "logprobs": num_topk + 1 if num_topk > 0 else num_topk,
        "detokenize": False,
        "seed": seed,  # None lets the server draw, which is faster on a GPU
    }
    return {"token_ids": list(prompt_ids), "return_token_ids": True, "sampling_params": parameters}


def completions_in(
    answer: dict[str, Any], message: dict[str, Any], num_topk: int, weights: Mapping[str, int]
) -> list[Completion]:
    """The completions in an answer.

    Args:
        answer: what the server said.
        message: what it was asked.
        num_topk: most likely tokens that were asked for at each place; -1 for the whole vocabulary.
        weights: those that it may have sampled with: labels and numbers, in the order in which it was sent them.

    Returns:
        The completions, each with the number of the oldest weights of its tokens.

    Raises:
        ValueError: if they are not the completions that were asked for, or a token is of other weights.
        KeyError: if something is missing.
    """
    if answer["prompt_token_ids"] != message["token_ids"]:
        raise ValueError("it did not continue the prompt that it was given")
    choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
    if len(choices) != message["sampling_params"]["n"]:
        raise ValueError(f"{len(choices)} completions instead of {message['sampling_params']['n']}")
    return [_completion(choice, num_topk, _oldest_weights(choice, weights)) for choice in choices]


def _oldest_weights(choice: dict[str, Any], weights: Mapping[str, int]) -> int:
    """The number of the weights that the first token was drawn with."""
    found = [span["version"] for span in choice["weight_versions"] or ()]
    if not found or found != [label for label in weights if label in found]:
        raise ValueError(f"it sampled with weights {found} instead of {list(weights)}")
    return weights[found[0]]


def _completion(choice: dict[str, Any], num_topk: int, weights_version: int) -> Completion:
    if choice["finish_reason"] not in ("stop", "length"):
        raise ValueError(f"it ended a completion with {choice['finish_reason']!r} instead of `stop` or `length`")
    places = choice["logprobs"]["content"]
    if [place["token_id"] for place in places] != choice["token_ids"]:
        raise ValueError("it gave logprobs of other tokens than it sampled")
    logprobs = [_logprob(place) for place in places]
    topk: dict[str, Any] = {}
    if num_topk:
        rows = [_most_likely(place["top_logprobs"], num_topk) for place in places]
        topk = {
            "topk_ids": torch.tensor([[entry["token_id"] for entry in row] for row in rows]),
            "topk_logprobs": torch.tensor([[_logprob(entry) for entry in row] for row in rows]),
        }
    return Completion(choice["token_ids"], logprobs, choice["finish_reason"], **topk, weights_version=weights_version)


def _most_likely(entries: list[dict[str, Any]], num_topk: int) -> list[dict[str, Any]]:
    """The entries of the K most likely tokens, without the sampled one where it is none of them."""
    ranked = sorted(entries, key=lambda entry: int(entry["rank"]))
    return ranked if num_topk < 0 else ranked[:num_topk]


def _logprob(entry: dict[str, Any]) -> float:
    value = float(entry["logprob"])
    return value if value > LEAST_LOGPROB else -math.inf
