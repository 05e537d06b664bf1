"""PPO's and GRPO's clipped importance ratio."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from drpo_lightning.functional.ratios import importance_ratio
from drpo_lightning.objectives.base import Objective, TokenInputs, TokenTerms


def clipped_ratio(
    policy_logprobs: Float[Tensor, "*tokens"],
    rollout_logprobs: Float[Tensor, "*tokens"],
    advantages: Float[Tensor, "*tokens"],
    *,
    clip_low: float,
    clip_high: float,
) -> TokenTerms:
    """PPO-clip: `min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`.

        grad_weight w = 0 where A > 0 and r > 1 + clip_high, or A < 0 and r < 1 - clip_low; else 1

    Args:
        policy_logprobs: log pi in nats.
        rollout_logprobs: log mu in nats.
        advantages: A, in units of reward.
        clip_low: how far the ratio may fall below 1, without unit.
        clip_high: how far the ratio may rise above 1, without unit.

    Returns:
        Objective, its derivative, and the tokens that are not clipped as `keep`.

    Source: Schulman et al., arXiv 1707.06347, eq. 7; asymmetric range: DAPO, arXiv 2503.14476, eq. 10.
    """
    ratio = importance_ratio(policy_logprobs, rollout_logprobs)
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    with torch.no_grad():
        clipped = ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))
        coefficient = torch.where(clipped, 0.0, ratio * advantages)
    return TokenTerms(objective, coefficient, ~clipped)


@final
@dataclass(frozen=True)
class ClippedRatio(Objective):
    """PPO's clipped ratio, with DAPO's asymmetric range as default. See `clipped_ratio` for the formula.

    Args:
        clip_low: how far the ratio may fall below 1, in (0, 1).
        clip_high: how far the ratio may rise above 1.

    Raises:
        ValueError: if a bound is out of range.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28

    def __post_init__(self) -> None:
        if not 0 < self.clip_low < 1:
            raise ValueError(f"`clip_low` must be in (0, 1), got {self.clip_low}")
        if not self.clip_high > 0:
            raise ValueError(f"`clip_high` must be positive, got {self.clip_high}")

    @property
    def has_mask(self) -> bool:
        """See `Objective.has_mask`."""
        return True

    def terms(self, tokens: TokenInputs) -> TokenTerms:
        """See `clipped_ratio`."""
        return clipped_ratio(
            tokens.policy_logprobs,
            tokens.rollout_logprobs,
            tokens.advantages,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
        )

    def describe(self) -> str:
        """The range in numbers."""
        return f"ClippedRatio: ratio clipped to [{1 - self.clip_low:g}, {1 + self.clip_high:g}]"
