"""The penalty that keeps the policy near a frozen reference model: estimates of KL(pi || ref) from sampled tokens.

The estimators of `divergences` take samples of the first distribution, and so do these: of pi, not of the reference.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from drpo_lightning.functional.ratios import LOG_RATIO_CLAMP, importance_ratio, within_log_ratio_clamp

Estimator = Literal["k1", "k3"]
ESTIMATORS = ("k1", "k3")


def reference_kl(
    policy_logprobs: Float[Tensor, "*tokens"], reference_logprobs: Float[Tensor, "*tokens"], *, estimator: Estimator
) -> Float[Tensor, "*tokens"]:
    """One-sample estimate of KL(pi || ref) at tokens that were sampled from pi, in nats.

        k1 = log pi - log ref                      unbiased, of either sign
        k3 = ref / pi - 1 + log pi - log ref       unbiased, never negative

    `log ref - log pi` is taken as at most 20, since only there `ref / pi` grows without bound. There is no clamp on the
    other side: a token that the reference all but rules out is what the penalty is for, and its estimate is finite.

    Args:
        policy_logprobs: log pi in nats, or log mu for the divergence of the rollout itself.
        reference_logprobs: log ref in nats.
        estimator: `k1` or `k3`.

    Returns:
        The estimate in nats; exactly 0 where pi = ref.

    Raises:
        ValueError: if the estimator is unknown.

    Source: Schulman, *Approximating KL Divergence*, 2020.
    """
    log_ratio = (reference_logprobs - policy_logprobs).clamp(max=LOG_RATIO_CLAMP)
    if estimator == "k1":
        return -log_ratio
    if estimator == "k3":
        return torch.expm1(log_ratio) - log_ratio
    raise ValueError(f"`estimator` must be one of {list(ESTIMATORS)}, got {estimator!r}")


def has_reference_gradient(
    policy_logprobs: Float[Tensor, "*tokens"], reference_logprobs: Float[Tensor, "*tokens"]
) -> Bool[Tensor, "*tokens"]:
    """True where `log ref - log pi <= 20`, the tokens that `reference_penalty` has a gradient at."""
    return reference_logprobs - policy_logprobs <= LOG_RATIO_CLAMP


def reference_penalty(
    policy_logprobs: Float[Tensor, "*tokens"],
    rollout_logprobs: Float[Tensor, "*tokens"],
    reference_logprobs: Float[Tensor, "*tokens"],
    completion_mask: Bool[Tensor, "*tokens"],
    *,
    estimator: Estimator = "k3",
    importance_weighted: bool = True,
) -> Float[Tensor, "*tokens"]:
    """Per-token penalty `r k` or `k`, to be minimised, with k of `reference_kl` and r = pi / mu.

                  d penalty / d log pi             its mean over samples of pi is the gradient of
        r k1      r (1 + log pi - log ref)         KL(pi || ref)
        r k3      r (log pi - log ref)             KL(pi || ref)
        k1        1                                nothing: the mean is 0
        k3        1 - ref / pi                     KL(ref || pi), the other direction

    The ratio carries a gradient: the tokens were sampled, and the gradient of a mean over samples of pi is not the mean
    of the gradients. With it `E_mu[r k]` is KL(pi || ref) whatever the weights were that sampled, and its gradient is
    exact. `r k3 = r k1 - r + ref / mu`, whose last term does not depend on pi: k3's gradient leaves out k1's constant,
    which has the mean 0 and only adds noise. Plain k3 is GRPO's penalty: its gradient vanishes at pi = ref too, but far
    from there it pulls as the forward divergence does. Exact means given the tokens before: what a token does to the
    divergence of later ones is left out, as everywhere in per-token losses.

    A token beyond a clamp, |log pi - log mu| > 20 if weighted or log ref - log pi > 20, has a finite penalty and no
    gradient.

    Args:
        policy_logprobs: log pi in nats; the only tensor with a gradient.
        rollout_logprobs: log mu in nats, of the distribution that was sampled from.
        reference_logprobs: log ref in nats.
        completion_mask: True on sampled tokens; elsewhere the inputs may hold anything, NaN included.
        estimator: `k1` or `k3`.
        importance_weighted: True multiplies by r.

    Returns:
        The penalty in nats, not yet multiplied by beta; exactly 0 outside the completions and where pi = ref.

    Raises:
        ValueError: if the estimator is unknown.

    Source: the exact gradient, Tang and Munos, arXiv 2506.09477; plain k3, GRPO, arXiv 2402.03300, eq. 4.
    """

    def masked(values: Tensor) -> Tensor:
        # The inputs are masked, not the output: where(mask, exp(inf), 0) has a NaN gradient.
        return torch.where(completion_mask, values, 0.0)

    pi, mu = masked(policy_logprobs.float()), masked(rollout_logprobs.detach().float())
    ref = masked(reference_logprobs.detach().float())
    has_gradient = has_reference_gradient(pi, ref)
    if importance_weighted:
        has_gradient &= within_log_ratio_clamp(pi, mu)
    # Not left to the clamps alone: each would stop one factor of the product and leave the gradient of the other.
    pi = torch.where(has_gradient, pi, pi.detach())
    penalty = reference_kl(pi, ref, estimator=estimator)
    return importance_ratio(pi, mu) * penalty if importance_weighted else penalty
