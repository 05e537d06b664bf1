"""Divergences between the behaviour policy mu and the policy pi, per sampled token."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from drpo_lightning.functional.ratios import LOG_RATIO_CLAMP, probability_shift


def log1mexp(logprobs: Float[Tensor, "*tokens"]) -> Float[Tensor, "*tokens"]:
    """`log(1 - exp(x))` for x <= 0, exact to rounding near 0 and near minus infinity.

    Source: Maechler, *Accurately Computing log(1 - exp(-|a|))*, 2012. At x = 0 it is minus infinity.
    """
    return torch.where(
        logprobs > -math.log(2),
        torch.log(-torch.expm1(logprobs)),
        torch.log1p(-logprobs.exp()),
    )


def binary_tv_divergence(
    policy_logprobs: Float[Tensor, "*tokens"], rollout_logprobs: Float[Tensor, "*tokens"]
) -> Float[Tensor, "*tokens"]:
    """Total variation between Bern(mu) and Bern(pi), "is it the sampled token?": `|pi - mu|`.

    A lower bound of the total variation over the whole vocabulary.
    Source: Qi et al., *Rethinking the Trust Region in LLM RL*, arXiv 2602.04879.

    Returns:
        The divergence in units of probability, in [0, 1].
    """
    return probability_shift(policy_logprobs, rollout_logprobs).abs()


def binary_kl_divergence(
    policy_logprobs: Float[Tensor, "*tokens"], rollout_logprobs: Float[Tensor, "*tokens"]
) -> Float[Tensor, "*tokens"]:
    """KL(Bern(mu) || Bern(pi)) `= mu log(mu / pi) + (1 - mu) log((1 - mu) / (1 - pi))`, in nats.

    A lower bound of KL(mu || pi) over the whole vocabulary. `log(1 - p)` is taken by `log1mexp`, since
    `log(1 - p + eps)` is off by a factor near p = 1.
    Source: Qi et al., arXiv 2602.04879.

    Returns:
        The divergence in nats, >= 0; the limits `0 log 0 = 0` hold, and it is infinite where pi = 1 and mu < 1.
    """
    mu = rollout_logprobs.exp()
    log_ratio = (policy_logprobs - rollout_logprobs).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    rest_mu, rest_pi = log1mexp(rollout_logprobs), log1mexp((rollout_logprobs + log_ratio).clamp(max=0.0))
    # mu = 1 leaves no rest: (1 - mu) log(...) is 0 there, whatever 1 - pi is.
    rest = torch.where(rest_mu.isneginf(), torch.zeros_like(mu), -torch.expm1(rollout_logprobs) * (rest_mu - rest_pi))
    return (rest - mu * log_ratio).clamp(min=0.0)


def k1_divergence(
    policy_logprobs: Float[Tensor, "*tokens"], rollout_logprobs: Float[Tensor, "*tokens"]
) -> Float[Tensor, "*tokens"]:
    """One-sample estimate of KL(mu || pi): `-log r = log mu - log pi`, in nats; unbiased, of either sign."""
    return rollout_logprobs - policy_logprobs


def k3_divergence(
    policy_logprobs: Float[Tensor, "*tokens"], rollout_logprobs: Float[Tensor, "*tokens"]
) -> Float[Tensor, "*tokens"]:
    """One-sample estimate of KL(mu || pi): `r - 1 - log r`, in nats; unbiased and never negative.

    Source: Schulman, *Approximating KL Divergence*, 2020. The log-ratio is clamped as in `importance_ratio`.
    """
    log_ratio = (policy_logprobs - rollout_logprobs).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    return torch.expm1(log_ratio) - log_ratio
