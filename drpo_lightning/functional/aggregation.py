"""From per-token losses to the loss of one micro-batch, with a denominator that is global to the optimizer update."""

from collections.abc import Mapping
from types import MappingProxyType

from jaxtyping import Bool, Float
from torch import Tensor

AGGREGATIONS: Mapping[str, str] = MappingProxyType(
    {
        "token_mean": "sum over tokens / tokens of the update (DAPO, arXiv 2503.14476)",
        "seq_mean_token_mean": "mean over sequences of the mean over tokens (GRPO, arXiv 2402.03300)",
        "seq_mean_token_sum_norm": "mean over sequences of the sum over tokens / horizon (Dr.GRPO, arXiv 2503.20783)",
    }
)


def aggregate_loss(
    loss: Float[Tensor, "batch seq"],
    completion_mask: Bool[Tensor, "batch seq"],
    *,
    kind: str,
    num_tokens: int,
    num_sequences: int,
    horizon: int | None = None,
) -> Float[Tensor, ""]:
    """Share of one micro-batch in the loss of an optimizer update.

    The shares of all micro-batches and ranks of an update add up to the loss of the whole: the gradient does not
    depend on how the update is split.

    Args:
        loss: per-token loss, 0 outside the completions.
        completion_mask: True on sampled tokens.
        kind: a key of `AGGREGATIONS`.
        num_tokens: completion tokens of the optimizer update, over all its micro-batches and ranks.
        num_sequences: sequences of the optimizer update, over all its micro-batches and ranks.
        horizon: tokens that `seq_mean_token_sum_norm` divides by; the paper takes 8192.

    Returns:
        The micro-batch's share, a scalar; 0 for a micro-batch without completion tokens.

    Raises:
        ValueError: if `kind` is unknown or `horizon` is missing where it is needed.
    """
    if kind == "token_mean":
        return loss.sum() / max(num_tokens, 1)
    if kind == "seq_mean_token_mean":
        lengths = completion_mask.sum(dim=1).clamp(min=1)
        return (loss.sum(dim=1) / lengths).sum() / max(num_sequences, 1)
    if kind == "seq_mean_token_sum_norm":
        if horizon is None:
            raise ValueError("`horizon` must be set for `seq_mean_token_sum_norm`, in tokens (the paper: 8192)")
        return loss.sum() / horizon / max(num_sequences, 1)
    raise ValueError(f"`kind` must be one of {sorted(AGGREGATIONS)}, got {kind!r}")
