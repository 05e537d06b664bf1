"""Logprobs of given tokens from logits, and of the distribution that a sampler draws from."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def target_logprobs(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, "tokens ..."], *, temperature: float = 1.0
) -> Float[Tensor, "tokens ..."]:
    """`log softmax(logits / T)[target]` in float32, of one or several target ids per token."""
    logits = logits.float() / temperature
    if targets.ndim == 1:
        return -F.cross_entropy(logits, targets, reduction="none")
    return logits.gather(1, targets) - logits.logsumexp(1, keepdim=True)


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
