"""SPO: the importance-weighted policy gradient under a quadratic penalty on the ratio."""

from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from drpo_lightning.functional.ratios import importance_ratio
from drpo_lightning.objectives.base import Objective, TokenInputs, TokenTerms


def spo(
    policy_logprobs: Float[Tensor, "*tokens"],
    rollout_logprobs: Float[Tensor, "*tokens"],
    advantages: Float[Tensor, "*tokens"],
    *,
    epsilon: float | Float[Tensor, "*tokens"],
) -> TokenTerms:
    """Simple Policy Optimization: `r A - |A| (r - 1)^2 / (2 epsilon)` per token.

        grad_weight w = 1 - sign(A) (r - 1) / epsilon

    Unbounded as mu -> 0: a rare token whose probability grows has a huge ratio. With the token's own range
    `epsilon = delta / mu` it is DRPO.

    Args:
        policy_logprobs: log pi in nats.
        rollout_logprobs: log mu in nats.
        advantages: A, in units of reward.
        epsilon: range of the ratio around 1, without unit; a number, or one per token.

    Returns:
        Objective and its derivative `r A w`. At pi = mu they are A and A.

    Source: Xie et al., *Simple Policy Optimization*, arXiv 2401.16025.
    """
    ratio = importance_ratio(policy_logprobs, rollout_logprobs)
    objective = ratio * advantages - advantages.abs() * (ratio - 1).square() / (2 * epsilon)
    weight = 1 - advantages.sign() * (ratio.detach() - 1) / epsilon
    return TokenTerms(objective, ratio.detach() * advantages * weight)


@final
@dataclass(frozen=True)
class SPO(Objective):
    """Simple Policy Optimization, arXiv 2401.16025. See `spo` for the formula.

    Args:
        epsilon: range of the ratio around 1, without unit; 12.5 is what DRPO's paper compares with.

    Raises:
        ValueError: if epsilon is not positive.
    """

    epsilon: float = 12.5

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise ValueError(f"`epsilon` must be positive, got {self.epsilon}")

    def terms(self, tokens: TokenInputs) -> TokenTerms:
        """See `spo`."""
        return spo(tokens.policy_logprobs, tokens.rollout_logprobs, tokens.advantages, epsilon=self.epsilon)

    def describe(self) -> str:
        """The range in words."""
        return (
            f"SPO(epsilon={self.epsilon:g}): updates fade out towards a ratio {self.epsilon:g} away from 1 and are "
            "corrected beyond it; gradient weights have no bound"
        )
