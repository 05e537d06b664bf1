"""CISPO: a policy gradient weighted by a truncated, detached importance ratio."""

from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from drpo_lightning.functional.ratios import importance_ratio, log_importance_ratio
from drpo_lightning.objectives.base import Objective, TokenInputs, TokenTerms


def cispo(
    policy_logprobs: Float[Tensor, "*tokens"],
    rollout_logprobs: Float[Tensor, "*tokens"],
    advantages: Float[Tensor, "*tokens"],
    *,
    max_ratio: float,
) -> TokenTerms:
    """Clipped IS-weight Policy Optimization: `sg(min(r, C)) A log r`, sg without a gradient.

    That is the paper's `sg(min(r, C)) A log pi` up to a constant, with the log-ratio clamped as in all objectives.

        grad_weight w = min(1, C / r)

    No token is dropped: a large ratio only counts as C.

    Args:
        policy_logprobs: log pi in nats.
        rollout_logprobs: log mu in nats.
        advantages: A, in units of reward.
        max_ratio: C, the largest importance weight.

    Returns:
        Objective, 0 at pi = mu, and its derivative `min(r, C) A`.

    Source: MiniMax-M1, arXiv 2506.13585, eq. 4, without its lower bound, which is not used there either.
    """
    coefficient = importance_ratio(policy_logprobs, rollout_logprobs).detach().clamp(max=max_ratio) * advantages
    return TokenTerms(coefficient * log_importance_ratio(policy_logprobs, rollout_logprobs), coefficient)


@final
@dataclass(frozen=True)
class CISPO(Objective):
    """Clipped IS-weight Policy Optimization, arXiv 2506.13585. See `cispo` for the formula.

    Args:
        max_ratio: C, the largest importance weight, at least 1.

    Raises:
        ValueError: if max_ratio is below 1: tokens at pi = mu would be scaled down.
    """

    max_ratio: float = 5.0

    def __post_init__(self) -> None:
        if not self.max_ratio >= 1:
            raise ValueError(f"`max_ratio` must be at least 1, got {self.max_ratio}")

    def terms(self, tokens: TokenInputs) -> TokenTerms:
        """See `cispo`."""
        return cispo(tokens.policy_logprobs, tokens.rollout_logprobs, tokens.advantages, max_ratio=self.max_ratio)

    def describe(self) -> str:
        """The bound in numbers."""
        return f"CISPO(max_ratio={self.max_ratio:g}): importance weights cut at {self.max_ratio:g}, no token dropped"
