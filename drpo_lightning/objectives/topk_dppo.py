"""DPPO with the divergence over more than the sampled token."""

from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from drpo_lightning.functional.divergences import TopKLogprobs, topk_kl_divergence, topk_tv_divergence
from drpo_lightning.objectives.base import Objective, TokenInputs, TokenTerms
from drpo_lightning.objectives.dppo import masked_objective

DIVERGENCES = {"tv": topk_tv_divergence, "kl": topk_kl_divergence}
DEFAULT_THRESHOLDS = {"tv": 0.15, "kl": 0.05}


def topk_dppo(
    policy_logprobs: Float[Tensor, "*tokens"],
    rollout_logprobs: Float[Tensor, "*tokens"],
    advantages: Float[Tensor, "*tokens"],
    topk: TopKLogprobs,
    *,
    divergence: Literal["tv", "kl"],
    threshold: float,
) -> TokenTerms:
    """DPPO with a divergence over mu's K most likely tokens: `M r A`, M = 0 where D > threshold and A (pi - mu) > 0.

        grad_weight w = M

    Args:
        policy_logprobs: log pi in nats.
        rollout_logprobs: log mu in nats.
        advantages: A, in units of reward.
        topk: logprobs of the K tokens under pi and mu.
        divergence: `tv` or `kl`, over the K tokens, the sampled one and one bucket for the rest.
        threshold: the region's radius, in units of probability for `tv`, in nats for `kl`. The divergence is at least
            the binary one, so that a threshold of `DPPO` masks more here.

    Returns:
        Objective, its derivative `M r A`, and M as `keep`. A divergence equal to the threshold is kept.

    Source: Qi et al., *Rethinking the Trust Region in LLM RL*, arXiv 2602.04879.
    """
    with torch.no_grad():
        outside = DIVERGENCES[divergence](policy_logprobs, rollout_logprobs, topk) > threshold
    return masked_objective(policy_logprobs, rollout_logprobs, advantages, outside)


@final
@dataclass(frozen=True)
class TopKDPPO(Objective):
    """DPPO with a divergence over mu's K most likely tokens, arXiv 2602.04879. See `topk_dppo` for the formula.

    The engine returns the K tokens with their logprobs for every sampled token.

    Args:
        k: tokens; the paper takes 20.
        divergence: `tv` or `kl`.
        threshold: the region's radius; by default that of `DPPO`, 0.15 for `tv` and 0.05 nats for `kl`.

    Raises:
        ValueError: if the divergence is unknown, or k or the threshold is not positive.
    """

    k: int = 20
    divergence: Literal["tv", "kl"] = "tv"
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"`k` must be at least 1, got {self.k}")
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"`divergence` must be one of {sorted(DIVERGENCES)}, got {self.divergence!r}")
        if self.threshold is not None and not self.threshold > 0:
            raise ValueError(f"`threshold` must be positive, got {self.threshold}")

    @property
    def radius(self) -> float:
        """The threshold in use."""
        return DEFAULT_THRESHOLDS[self.divergence] if self.threshold is None else self.threshold

    @property
    def required_inputs(self) -> frozenset[str]:
        """See `Objective.required_inputs`."""
        return frozenset({"topk"})

    @property
    def num_topk(self) -> int:
        """See `Objective.num_topk`."""
        return self.k

    @property
    def has_mask(self) -> bool:
        """See `Objective.has_mask`."""
        return True

    def terms(self, tokens: TokenInputs) -> TokenTerms:
        """See `topk_dppo`."""
        assert tokens.topk is not None
        return topk_dppo(
            tokens.policy_logprobs,
            tokens.rollout_logprobs,
            tokens.advantages,
            tokens.topk,
            divergence=self.divergence,
            threshold=self.radius,
        )

    def describe(self) -> str:
        """The mask in words."""
        unit = "in units of probability" if self.divergence == "tv" else "nats"
        return (
            f"TopKDPPO(k={self.k}, {self.divergence}, threshold={self.radius:g} {unit}): diverging tokens beyond the "
            "region get no gradient"
        )
