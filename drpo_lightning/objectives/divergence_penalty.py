"""The importance-weighted policy gradient under a plain divergence penalty: ablations of DRPO's regulariser."""

from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from drpo_lightning.functional.ratios import importance_ratio, log_importance_ratio
from drpo_lightning.objectives.base import Objective, TokenInputs, TokenTerms

PENALTIES = ("kl", "k3", "tv")


def divergence_penalty(
    policy_logprobs: Float[Tensor, "*tokens"],
    rollout_logprobs: Float[Tensor, "*tokens"],
    advantages: Float[Tensor, "*tokens"],
    *,
    divergence: Literal["kl", "k3", "tv"],
    beta: float,
    scale_by_advantage: bool = False,
) -> TokenTerms:
    """`r A - b D` per token, with b = beta, or beta |A|, and a one-sample estimate D of a divergence of pi from mu.

        kl   D = -log r            w = 1 + b / (r A)
        k3   D = r - 1 - log r     w = 1 - b (1 - 1 / r) / A
        tv   D = |r - 1| / 2       w = 1 - b sign(r - 1) / (2 A)

    Only k3's and tv's gradient vanishes at pi = mu: that of kl is the same everywhere, and raises the probability of
    every sampled token. None has a boundary, where the gradient of a diverging update vanishes whatever A is.

    Args:
        policy_logprobs: log pi in nats.
        rollout_logprobs: log mu in nats.
        advantages: A, in units of reward.
        divergence: `kl` or `k3`, estimates of KL(mu || pi) in nats, or `tv`, of the total variation.
        beta: weight of the penalty, in units of reward.
        scale_by_advantage: True multiplies the penalty by |A|; beta is without unit then.

    Returns:
        Objective and its derivative. At pi = mu the objective is A.

    Source: ablations in Yao et al., arXiv 2606.09821; estimators: Schulman, *Approximating KL Divergence*, 2020.
    """
    ratio = importance_ratio(policy_logprobs, rollout_logprobs)
    log_ratio = log_importance_ratio(policy_logprobs, rollout_logprobs)
    scale = beta * (advantages.abs() if scale_by_advantage else torch.ones_like(advantages))
    if divergence == "kl":
        penalty, derivative = -log_ratio, -torch.ones_like(ratio)
    elif divergence == "k3":
        penalty, derivative = ratio - 1 - log_ratio, ratio - 1
    else:
        penalty, derivative = (ratio - 1).abs() / 2, ratio * (ratio - 1).sign() / 2
    coefficient = (ratio * advantages - scale * derivative).detach()
    return TokenTerms(ratio * advantages - scale * penalty, coefficient)


@final
@dataclass(frozen=True)
class DivergencePenalty(Objective):
    """A penalty by KL, K3 or TV instead of DRPO's quadratic one. See `divergence_penalty` for the formula.

    Args:
        divergence: `kl`, `k3` or `tv`.
        beta: weight of the penalty, in units of reward.
        scale_by_advantage: True multiplies the penalty by |A|.

    Raises:
        ValueError: if the divergence is unknown or beta is not positive.
    """

    divergence: Literal["kl", "k3", "tv"] = "k3"
    beta: float = 0.1
    scale_by_advantage: bool = False

    def __post_init__(self) -> None:
        if self.divergence not in PENALTIES:
            raise ValueError(f"`divergence` must be one of {sorted(PENALTIES)}, got {self.divergence!r}")
        if not self.beta > 0:
            raise ValueError(f"`beta` must be positive, got {self.beta}; without a penalty take `Unregularized`")

    def terms(self, tokens: TokenInputs) -> TokenTerms:
        """See `divergence_penalty`."""
        return divergence_penalty(
            tokens.policy_logprobs,
            tokens.rollout_logprobs,
            tokens.advantages,
            divergence=self.divergence,
            beta=self.beta,
            scale_by_advantage=self.scale_by_advantage,
        )

    def describe(self) -> str:
        """The penalty in words."""
        factor = f"{self.beta:g} |A|" if self.scale_by_advantage else f"{self.beta:g}"
        return f"DivergencePenalty: {factor} times the {self.divergence} estimate; there is no boundary"
