"""SAPO: a soft gate on the importance ratio."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from drpo_lightning.functional.ratios import importance_ratio
from drpo_lightning.objectives.base import Objective, TokenInputs, TokenTerms


def sapo(
    policy_logprobs: Float[Tensor, "*tokens"],
    rollout_logprobs: Float[Tensor, "*tokens"],
    advantages: Float[Tensor, "*tokens"],
    *,
    temperature_positive: float,
    temperature_negative: float,
) -> TokenTerms:
    """Soft Adaptive Policy Optimization: `(4 / tau) sigmoid(tau (r - 1)) A`, tau by the sign of A.

        grad_weight w = 4 p (1 - p), p = sigmoid(tau (r - 1))

    w is 1 at pi = mu and falls off smoothly on both sides.

    Args:
        policy_logprobs: log pi in nats.
        rollout_logprobs: log mu in nats.
        advantages: A, in units of reward.
        temperature_positive: tau of tokens with A > 0.
        temperature_negative: tau of the others; a larger one closes the gate sooner.

    Returns:
        Objective and its derivative `4 p (1 - p) r A`. At pi = mu they are 2 A / tau and A.

    Source: SAPO, arXiv 2511.20347.
    """
    ratio = importance_ratio(policy_logprobs, rollout_logprobs)
    tau = torch.full_like(advantages, temperature_negative).masked_fill(advantages > 0, temperature_positive)
    gate = torch.sigmoid(tau * (ratio - 1))
    weight = 4 * gate.detach() * (1 - gate.detach())
    return TokenTerms(4 / tau * gate * advantages, weight * ratio.detach() * advantages)


@final
@dataclass(frozen=True)
class SAPO(Objective):
    """Soft Adaptive Policy Optimization, arXiv 2511.20347. See `sapo` for the formula.

    Args:
        temperature_positive: tau of tokens with A > 0.
        temperature_negative: tau of the others.

    Raises:
        ValueError: if a temperature is not positive.
    """

    temperature_positive: float = 1.0
    temperature_negative: float = 1.05

    def __post_init__(self) -> None:
        for name in ("temperature_positive", "temperature_negative"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"`{name}` must be positive, got {value}")

    def terms(self, tokens: TokenInputs) -> TokenTerms:
        """See `sapo`."""
        return sapo(
            tokens.policy_logprobs,
            tokens.rollout_logprobs,
            tokens.advantages,
            temperature_positive=self.temperature_positive,
            temperature_negative=self.temperature_negative,
        )

    def describe(self) -> str:
        """The gates in numbers."""
        positive, negative = self.temperature_positive, self.temperature_negative
        return f"SAPO: soft gate on the ratio, tau {positive:g} for A > 0, else {negative:g}"
