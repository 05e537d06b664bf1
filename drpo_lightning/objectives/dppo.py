"""DPPO: the importance-weighted policy gradient under a hard divergence mask."""

from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from drpo_lightning.functional.divergences import binary_kl_divergence, binary_tv_divergence
from drpo_lightning.functional.ratios import importance_ratio, probability_shift
from drpo_lightning.objectives.base import Objective, TokenInputs, TokenTerms

DIVERGENCES = {"binary_tv": binary_tv_divergence, "binary_kl": binary_kl_divergence}
DEFAULT_THRESHOLDS = {"binary_tv": 0.15, "binary_kl": 0.05}


def dppo(
    policy_logprobs: Float[Tensor, "*tokens"],
    rollout_logprobs: Float[Tensor, "*tokens"],
    advantages: Float[Tensor, "*tokens"],
    *,
    divergence: Literal["binary_tv", "binary_kl"],
    threshold: float,
) -> TokenTerms:
    """Divergence Proximal Policy Optimization: `M r A`, M = 0 where D > threshold and A (pi - mu) > 0.

        grad_weight w = M

    A token that has moved beyond the region in the direction of its advantage gets no gradient; one that has moved
    the other way keeps it in full.

    Args:
        policy_logprobs: log pi in nats.
        rollout_logprobs: log mu in nats.
        advantages: A, in units of reward.
        divergence: `binary_tv` is |pi - mu|, `binary_kl` is KL(Bern(mu) || Bern(pi)).
        threshold: the region's radius, in units of probability for `binary_tv`, in nats for `binary_kl`.

    Returns:
        Objective, its derivative `M r A`, and M as `keep`. A divergence equal to the threshold is kept.

    Source: Qi et al., *Rethinking the Trust Region in LLM RL*, arXiv 2602.04879.
    """
    with torch.no_grad():
        outside = DIVERGENCES[divergence](policy_logprobs, rollout_logprobs) > threshold
    return masked_objective(policy_logprobs, rollout_logprobs, advantages, outside)


def masked_objective(
    policy_logprobs: Float[Tensor, "*tokens"],
    rollout_logprobs: Float[Tensor, "*tokens"],
    advantages: Float[Tensor, "*tokens"],
    outside: Bool[Tensor, "*tokens"],
) -> TokenTerms:
    """`M r A`, M = 0 on tokens outside a region that have moved in the direction of their advantage.

    Args:
        policy_logprobs: log pi in nats.
        rollout_logprobs: log mu in nats.
        advantages: A, in units of reward.
        outside: True where the divergence is beyond the region's radius.

    Returns:
        Objective, its derivative, and M as `keep`.
    """
    ratio = importance_ratio(policy_logprobs, rollout_logprobs)
    with torch.no_grad():
        keep = ~(outside & (advantages * probability_shift(policy_logprobs, rollout_logprobs) > 0))
    objective = keep * ratio * advantages
    return TokenTerms(objective, objective.detach(), keep)


@final
@dataclass(frozen=True)
class DPPO(Objective):
    """Divergence Proximal Policy Optimization, arXiv 2602.04879. See `dppo` for the formula.

    Args:
        divergence: `binary_tv` or `binary_kl`.
        threshold: the region's radius; by default the paper's, 0.15 for `binary_tv` and 0.05 nats for `binary_kl`.

    Raises:
        ValueError: if the divergence is unknown or the threshold is not positive.
    """

    divergence: Literal["binary_tv", "binary_kl"] = "binary_tv"
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"`divergence` must be one of {sorted(DIVERGENCES)}, got {self.divergence!r}")
        if self.threshold is not None and not self.threshold > 0:
            raise ValueError(f"`threshold` must be positive, got {self.threshold}")

    @property
    def radius(self) -> float:
        """The threshold in use."""
        return DEFAULT_THRESHOLDS[self.divergence] if self.threshold is None else self.threshold

    @property
    def has_mask(self) -> bool:
        """See `Objective.has_mask`."""
        return True

    def terms(self, tokens: TokenInputs) -> TokenTerms:
        """See `dppo`."""
        return dppo(
            tokens.policy_logprobs,
            tokens.rollout_logprobs,
            tokens.advantages,
            divergence=self.divergence,
            threshold=self.radius,
        )

    def describe(self) -> str:
        """The mask in words."""
        unit = "in units of probability" if self.divergence == "binary_tv" else "nats"
        return (
            f"DPPO({self.divergence}, threshold={self.radius:g} {unit}): diverging tokens beyond the region get no "
            "gradient"
        )
