"""Divergences between the behaviour policy mu and the policy pi, per sampled token."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
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


class TopKLogprobs(NamedTuple):
    """The K most likely tokens under mu at the position of each sampled token.

    Attributes:
        policy_logprobs: their log pi, in nats.
        rollout_logprobs: their log mu, in nats.
        holds_sampled: True where the sampled token is one of them.
    """

    policy_logprobs: Float[Tensor, "*tokens k"]
    rollout_logprobs: Float[Tensor, "*tokens k"]
    holds_sampled: Bool[Tensor, "*tokens"]

    def masked(self, completion_mask: Bool[Tensor, "*tokens"]) -> "TopKLogprobs":
        """The same with pi = mu outside the completions, detached and in float32."""
        none = torch.tensor(-torch.inf, device=completion_mask.device)
        mask = completion_mask[..., None]
        return TopKLogprobs(
            torch.where(mask, self.policy_logprobs.detach().float(), none),
            torch.where(mask, self.rollout_logprobs.detach().float(), none),
            self.holds_sampled & completion_mask,
        )


def topk_tv_divergence(
    policy_logprobs: Float[Tensor, "*tokens"], rollout_logprobs: Float[Tensor, "*tokens"], topk: TopKLogprobs
) -> Float[Tensor, "*tokens"]:
    """Total variation over mu's K most likely tokens, the sampled token, and one bucket for the rest.

        1/2 (sum over buckets |pi_i - mu_i|)

    At least `binary_tv_divergence`, at most the total variation over the whole vocabulary, which it equals for K = V.
    The sampled token is added to the top K; published code puts it in the place of the K-th entry.
    Source: Qi et al., *Rethinking the Trust Region in LLM RL*, arXiv 2602.04879.

    Returns:
        The divergence in units of probability, in [0, 1].
    """
    pi, mu = _bucket_logprobs(policy_logprobs, rollout_logprobs, topk)
    return (pi.exp() - mu.exp()).abs().sum(-1) / 2


def topk_kl_divergence(
    policy_logprobs: Float[Tensor, "*tokens"], rollout_logprobs: Float[Tensor, "*tokens"], topk: TopKLogprobs
) -> Float[Tensor, "*tokens"]:
    """KL(mu || pi) over the buckets of `topk_tv_divergence`, in nats: `sum mu_i log(mu_i / pi_i)`.

    Returns:
        The divergence in nats, >= 0 and finite: the log-ratio of a bucket is clamped at +-20, as everywhere.
    """
    pi, mu = _bucket_logprobs(policy_logprobs, rollout_logprobs, topk)
    # mu = 0 leaves nothing to sum, and -inf - (-inf) is NaN.
    log_ratio = torch.where(mu.isneginf(), 0.0, (pi - mu).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP))
    return -(mu.exp() * log_ratio).sum(-1).clamp(max=0.0)


def _bucket_logprobs(
    policy_logprobs: Float[Tensor, "*tokens"], rollout_logprobs: Float[Tensor, "*tokens"], topk: TopKLogprobs
) -> tuple[Float[Tensor, "*tokens buckets"], Float[Tensor, "*tokens buckets"]]:
    """Logprobs under pi and mu of the top K, of the sampled token (minus infinity if it is among them), of the rest."""

    def buckets(sampled: Tensor, likely: Tensor) -> Tensor:
        own = sampled.masked_fill(topk.holds_sampled, -torch.inf)
        named = torch.cat([likely, own[..., None]], -1)
        # What rounding leaves of 1 - 1 counts as nothing in float32.
        rest = (1 - named.double().exp().sum(-1, keepdim=True)).clamp(min=math.exp2(-24)).log()
        return torch.cat([named, rest.to(named.dtype)], -1)

    return buckets(policy_logprobs, topk.policy_logprobs), buckets(rollout_logprobs, topk.rollout_logprobs)
