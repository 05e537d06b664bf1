"""Divergences between the behaviour policy mu and the policy pi, per sampled token."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from drpo_lightning.functional.ratios import LOG_RATIO_CLAMP, probability_shift

LARGEST_LOGPROB = -(2.0**-24)
"""Logprobs above this, in nats, round to a probability of 1 in float32: what is left to the other tokens is lost."""


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
        The divergence in nats, >= 0 and finite: 1 - pi is taken as at least 2^-24, which is as close to 1 as float32
        can tell; the limit `0 log 0 = 0` holds.
    """
    log_mu = rollout_logprobs.clamp(max=0.0)
    # The clamp of `importance_ratio`, put on log pi: log mu + (log pi - log mu) would round where pi is near 1.
    log_pi = policy_logprobs.clamp(log_mu - LOG_RATIO_CLAMP, log_mu + LOG_RATIO_CLAMP)
    rest_mu, rest_pi = log1mexp(log_mu), log1mexp(log_pi.clamp(max=LARGEST_LOGPROB))
    # mu = 1 leaves no rest: (1 - mu) log(...) is 0 there, whatever 1 - pi is.
    rest = torch.where(rest_mu.isneginf(), 0.0, -torch.expm1(log_mu) * (rest_mu - rest_pi))
    return (rest - log_mu.exp() * (log_pi - log_mu)).clamp(min=0.0)


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
