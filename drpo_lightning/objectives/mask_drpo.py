"""Mask-DRPO, an ablation: DRPO's penalty where DPPO's mask would drop the token, nothing elsewhere."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from drpo_lightning.objectives.base import Objective, TokenInputs, TokenTerms
from drpo_lightning.objectives.dppo import dppo
from drpo_lightning.objectives.drpo import drpo
from drpo_lightning.objectives.unregularized import unregularized


def mask_drpo(
    policy_logprobs: Float[Tensor, "*tokens"],
    rollout_logprobs: Float[Tensor, "*tokens"],
    advantages: Float[Tensor, "*tokens"],
    *,
    delta: float,
    threshold: float,
) -> TokenTerms:
    """`M r A + (1 - M) (r A - |A| mu (r - 1)^2 / (2 delta))`, M the mask of DPPO with |pi - mu| > threshold.

        grad_weight w = 1 where M = 1, else 1 - |pi - mu| / delta

    It jumps at the threshold, from 1 to 1 - threshold / delta. With delta = threshold that is 0, the weight of DPPO,
    and a token beyond it is corrected; with delta above 1 no token ever is.

    Args:
        policy_logprobs: log pi in nats.
        rollout_logprobs: log mu in nats.
        advantages: A, in units of reward.
        delta: trust-region radius of the penalty, in units of probability.
        threshold: |pi - mu| beyond which a diverging token is penalised, in units of probability.

    Returns:
        Objective and its derivative `r A w`. No token is dropped, so there is no mask in the result.

    Source: ablation in Yao et al., arXiv 2606.09821.
    """
    tokens = (policy_logprobs, rollout_logprobs, advantages)
    inside = dppo(*tokens, divergence="binary_tv", threshold=threshold).keep
    plain, penalised = unregularized(*tokens), drpo(*tokens, delta=delta)
    assert inside is not None
    return TokenTerms(
        torch.where(inside, plain.objective, penalised.objective),
        torch.where(inside, plain.grad_coefficient, penalised.grad_coefficient),
    )


@final
@dataclass(frozen=True)
class MaskDRPO(Objective):
    """DRPO's penalty only where DPPO's mask would drop the token. See `mask_drpo` for the formula.

    Args:
        delta: trust-region radius of the penalty, in units of probability.
        threshold: |pi - mu| beyond which a diverging token is penalised, in units of probability.

    Raises:
        ValueError: if a setting is not positive.
    """

    delta: float = 12.5
    threshold: float = 0.15

    def __post_init__(self) -> None:
        for name in ("delta", "threshold"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"`{name}` must be positive, in units of probability, got {value}")

    def terms(self, tokens: TokenInputs) -> TokenTerms:
        """See `mask_drpo`."""
        return mask_drpo(
            tokens.policy_logprobs,
            tokens.rollout_logprobs,
            tokens.advantages,
            delta=self.delta,
            threshold=self.threshold,
        )

    def describe(self) -> str:
        """Where the penalty begins."""
        return (
            f"MaskDRPO(delta={self.delta:g}, threshold={self.threshold:g}): diverging tokens beyond "
            f"|pi - mu| = {self.threshold:g} are penalised as by DRPO, all others not at all"
        )
