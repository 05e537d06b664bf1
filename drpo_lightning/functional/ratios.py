"""Ratio and shift of the sampled token's probability between the policy pi and the behaviour policy mu."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LOG_RATIO_CLAMP = 20.0
"""Bound on |log pi - log mu|, in nats. Beyond it a token has a finite objective and no gradient."""


def log_importance_ratio(
    policy_logprobs: Float[Tensor, "*tokens"], rollout_logprobs: Float[Tensor, "*tokens"]
) -> Float[Tensor, "*tokens"]:
    """`clamp(log pi - log mu, -20, 20)`, in nats; without a gradient where the clamp is active."""
    return (policy_logprobs - rollout_logprobs).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)


def importance_ratio(
    policy_logprobs: Float[Tensor, "*tokens"], rollout_logprobs: Float[Tensor, "*tokens"]
) -> Float[Tensor, "*tokens"]:
    """Importance ratio of the sampled token: `r = pi / mu = exp(clamp(log pi - log mu, -20, 20))`.

    The clamp keeps the ratio finite in float32; where it is active the gradient is exactly zero.

    Args:
        policy_logprobs: log pi of the sampled tokens, in nats.
        rollout_logprobs: log mu of the same tokens, in nats.

    Returns:
        r, positive, 1 where pi = mu; at most e^20 = 4.9e8.
    """
    return log_importance_ratio(policy_logprobs, rollout_logprobs).exp()


def within_log_ratio_clamp(
    policy_logprobs: Float[Tensor, "*tokens"], rollout_logprobs: Float[Tensor, "*tokens"]
) -> Bool[Tensor, "*tokens"]:
    """True where `|log pi - log mu| <= 20`, the tokens that can have a gradient."""
    return (policy_logprobs - rollout_logprobs).abs() <= LOG_RATIO_CLAMP


def probability_shift(
    policy_logprobs: Float[Tensor, "*tokens"], rollout_logprobs: Float[Tensor, "*tokens"]
) -> Float[Tensor, "*tokens"]:
    """Signed shift of the sampled token's probability: `pi - mu = mu (r - 1)`.

    Written with `expm1`, so that a small shift is not lost in the difference of two close numbers. The ratio is
    clamped as in `importance_ratio`.

    Args:
        policy_logprobs: log pi of the sampled tokens, in nats.
        rollout_logprobs: log mu of the same tokens, in nats.

    Returns:
        pi - mu in units of probability, in [-1, 1]; 0 where pi = mu.
    """
    return rollout_logprobs.exp() * torch.expm1(log_importance_ratio(policy_logprobs, rollout_logprobs))
