"""The door: what an engine returns is checked before it is scored or trained on."""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from drpo_lightning.batch import Completion, Sampling
from drpo_lightning.rollout.engine import EngineError

MAX_LOGPROB = 1e-4
"""Largest log-probability that rounding explains, in nats.

A float32 `log_softmax`, which transformers and vLLM sample from, gives at most 0; a logit less the logarithm of the sum
of all may exceed 0 by the last bit of the logit, 1e-5 at a logit of 100. A larger value is no logprob: a raw logit, or
one of a distribution that does not sum to 1.
"""


def check_completions(
    groups: Sequence[Sequence[Completion]],
    sampling: Sampling,
    *,
    num_prompts: int,
    num_samples: int,
    stop_token_ids: Sequence[int],
    num_topk: int,
    vocabulary_size: int,
) -> None:
    """Checks that completions are what an engine was asked for, and possible at all.

    A token may be beyond the tokenizer's, as long as the model has a row for it: vocabularies are padded, and an
    untrained model samples the padding.

    Args:
        groups: the completions of each prompt.
        sampling: how they were to be drawn.
        num_prompts: how many prompts there were.
        num_samples: completions asked for per prompt.
        stop_token_ids: tokens that end a completion, as part of it.
        num_topk: most likely tokens asked for at each place; -1 for the whole vocabulary.
        vocabulary_size: tokens that the model has a row for.

    Raises:
        EngineError: naming the sample, by its number among all, and what is wrong with it.
    """
    if len(groups) != num_prompts:
        raise EngineError(f"the engine returned completions of {len(groups)} prompts for {num_prompts}")
    for number, group in enumerate(groups):
        if len(group) != num_samples:
            raise EngineError(f"the engine returned {len(group)} completions of prompt {number} for {num_samples}")
    completions = list(chain.from_iterable(groups))
    problem = (
        _problem_of_length(completions, sampling.max_tokens)
        or _problem_of_token(completions, stop_token_ids, vocabulary_size)
        or _problem_of_end(completions, stop_token_ids, sampling.max_tokens)
        or _problem_of_topk(completions, num_topk, vocabulary_size)
    )
    if problem:
        raise EngineError(
            f"the engine returned an impossible completion: sample {problem.sample} (of prompt "
            f"{problem.sample // num_samples}) {problem.reason}"
        )


class _Problem(NamedTuple):
    """What is wrong with a sample, as the end of a sentence that starts with it."""

    sample: int
    reason: str


def _problem_of_length(completions: Sequence[Completion], max_tokens: int) -> _Problem | None:
    for sample, completion in enumerate(completions):
        if not 0 < len(completion.token_ids) <= max_tokens:
            length = len(completion.token_ids)
            return _Problem(sample, f"has {length} tokens, not between 1 and `sampling.max_tokens` {max_tokens}")
    return None


def _problem_of_token(
    completions: Sequence[Completion], stop_token_ids: Sequence[int], vocabulary_size: int
) -> _Problem | None:
    """The first token that the model does not have, that cannot have been drawn, or after which there is no other."""
    ids = torch.tensor(list(chain.from_iterable(c.token_ids for c in completions)), dtype=torch.long)
    logprobs = torch.tensor(list(chain.from_iterable(c.logprobs for c in completions)), dtype=torch.double)
    ends = torch.tensor([len(completion.token_ids) for completion in completions], dtype=torch.long).cumsum(0)
    goes_on = torch.isin(ids, torch.tensor(list(stop_token_ids)))
    goes_on[ends - 1] = False
    is_unknown = (ids < 0) | (ids >= vocabulary_size)
    broken = is_unknown | ~_is_logprob(logprobs) | ~logprobs.isfinite() | goes_on
    if not broken.any():
        return None
    place = int(broken.nonzero()[0])
    sample = int(torch.searchsorted(ends, place, right=True))
    start = int(ends[sample]) - len(completions[sample].token_ids)
    token, logprob = int(ids[place]), float(logprobs[place])
    if is_unknown[place]:
        reason = f"has token id {token}, outside the vocabulary of {vocabulary_size} tokens"
    elif goes_on[place]:
        reason = f"goes on after stop token {token}"
    else:
        reason = f"has logprob {logprob:g}, which a sampled token cannot have"
    return _Problem(sample, f"{reason}, at place {place - start}")


def _is_logprob(values: Float[Tensor, "*tokens"]) -> Bool[Tensor, "*tokens"]:
    """True for the logarithms of probabilities, that of 0 included; False for NaN."""
    return values <= MAX_LOGPROB


def _problem_of_end(
    completions: Sequence[Completion], stop_token_ids: Sequence[int], max_tokens: int
) -> _Problem | None:
    """The first completion that does not end as its `finish_reason` says."""
    stop = set(stop_token_ids)
    for sample, completion in enumerate(completions):
        last, length = completion.token_ids[-1], len(completion.token_ids)
        if completion.is_truncated == (last in stop) or (completion.is_truncated and length != max_tokens):
            return _Problem(
                sample,
                f"has finish_reason {completion.finish_reason!r} after {length} of {max_tokens} tokens, the last of "
                f"which is {last}; the stop tokens are {sorted(stop)}",
            )
    return None


def _problem_of_topk(completions: Sequence[Completion], num_topk: int, vocabulary_size: int) -> _Problem | None:
    """The first completion without the most likely tokens that were asked for, or with impossible ones."""
    if not num_topk:
        return None
    width = vocabulary_size if num_topk < 0 else num_topk
    for sample, completion in enumerate(completions):
        ids, logprobs = completion.topk_ids, completion.topk_logprobs
        if ids is None or logprobs is None:
            return _Problem(sample, f"has no most likely tokens; {width} at each place were asked for")
        shape = (len(completion.token_ids), width)
        if ids.shape != shape or logprobs.shape != shape:
            shapes = f"{list(ids.shape)} and {list(logprobs.shape)}"
            return _Problem(sample, f"has most likely tokens and logprobs of shapes {shapes} instead of {list(shape)}")
        if (reason := _wrong_topk(ids, logprobs, vocabulary_size)) is not None:
            return _Problem(sample, f"has {reason} among the most likely tokens")
    return None


def _wrong_topk(ids: Int[Tensor, "tokens k"], logprobs: Float[Tensor, "tokens k"], vocabulary_size: int) -> str | None:
    """A token that the model does not have or a logprob that is none; minus infinity is that of a token cut off."""
    least, largest = (int(value) for value in ids.aminmax())
    if least < 0 or largest >= vocabulary_size:
        outside = least if least < 0 else largest
        return f"token id {outside}, outside the vocabulary of {vocabulary_size} tokens,"
    if not (possible := _is_logprob(logprobs)).all():
        return f"logprob {float(logprobs[~possible][0]):g}"
    return None
