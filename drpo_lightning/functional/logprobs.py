"""Logprobs of given tokens under a language model's head, and of the distribution that a sampler draws from."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def _chunk_logprobs(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"] | None,
    targets: Int[Tensor, "tokens ..."],
    temperature: float,
) -> Float[Tensor, "tokens ..."]:
    return target_logprobs(F.linear(hidden, weight, bias), targets, temperature=temperature)


def target_logprobs(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, "tokens ..."], *, temperature: float = 1.0
) -> Float[Tensor, "tokens ..."]:
    """`log softmax(logits / T)[target]` in float32, of one or several target ids per token."""
    logits = logits.float() / temperature
    if targets.ndim == 1:
        return -F.cross_entropy(logits, targets, reduction="none")
    return logits.gather(1, targets) - logits.logsumexp(1, keepdim=True)


def linear_token_logprobs(
    hidden: Float[Tensor, "tokens hidden"],
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, "tokens ..."],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> Float[Tensor, "tokens ..."]:
    """`log softmax(W h / T)[target]` of each token, without ever holding the logits of all tokens.

    The logits of `chunk_size` tokens exist at a time; the backward pass computes them again. Logits are turned to
    float32 before they are normalised, whatever the precision of `hidden`.

    Args:
        hidden: last hidden states, one row per predicted token.
        weight: the head's weight.
        targets: token ids whose logprob is asked, one or several per token.
        bias: the head's bias, if it has one.
        temperature: sampling temperature T that the logits are divided by.
        chunk_size: tokens whose logits exist at a time; the memory is `chunk_size * vocab` floats.

    Returns:
        Logprobs in nats, float32.
    """
    if len(targets) <= chunk_size:
        return _chunk_logprobs(hidden, weight, bias, targets, temperature)
    chunks = [
        checkpoint(
            _chunk_logprobs,
            hidden[start : start + chunk_size],
            weight,
            bias,
            targets[start : start + chunk_size],
            temperature,
            use_reentrant=False,
        )
        for start in range(0, len(targets), chunk_size)
    ]
    return torch.cat(chunks)


def sampling_logprobs(
    logits: Float[Tensor, "*batch vocab"], *, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0
) -> Float[Tensor, "*batch vocab"]:
    """Logprobs of the distribution that is sampled from: scaled, cut to top-k, then to top-p, renormalised.

    The order is vLLM's: top-k first, then the smallest set of what is left whose probability reaches top-p.

    Args:
        logits: raw logits.
        temperature: sampling temperature; 0 puts all probability on the first most likely token.
        top_p: share of the probability that is kept, in (0, 1].
        top_k: number of tokens that are kept, and those with the logit of the last of them; 0 keeps all.

    Returns:
        float32 logprobs; minus infinity on tokens that cannot be drawn.
    """
    logits = logits.float()
    if temperature == 0:
        greedy = torch.full_like(logits, -torch.inf)
        return greedy.scatter_(-1, logits.argmax(-1, keepdim=True), 0.0)
    logits = logits / temperature
    if top_k > 0:
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probs = ordered.softmax(-1)
        dropped = probs.cumsum(-1) - probs >= top_p
        logits = logits.masked_fill(dropped.gather(-1, order.argsort(-1)), -torch.inf)
    return logits.log_softmax(-1)
