"""The importance-weighted policy gradient, without any trust region."""

from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from drpo_lightning.functional.ratios import importance_ratio
from drpo_lightning.objectives.base import Objective, TokenInputs, TokenTerms


def unregularized(
    policy_logprobs: Float[Tensor, "*tokens"],
    rollout_logprobs: Float[Tensor, "*tokens"],
    advantages: Float[Tensor, "*tokens"],
) -> TokenTerms:
    """Importance-weighted policy gradient: `r A`, with grad_weight w = 1.

    Args:
        policy_logprobs: log pi in nats.
        rollout_logprobs: log mu in nats.
        advantages: A, in units of reward.

    Returns:
        Objective and its derivative, both `r A`.

    Source: PG-IS in Yao et al., arXiv 2606.09821.
    """
    objective = importance_ratio(policy_logprobs, rollout_logprobs) * advantages
    return TokenTerms(objective, objective.detach())


@final
@dataclass(frozen=True)
class Unregularized(Objective):
    """Importance-weighted policy gradient without a trust region: what every other objective is compared with."""

    def terms(self, tokens: TokenInputs) -> TokenTerms:
        """See `unregularized`."""
        return unregularized(tokens.policy_logprobs, tokens.rollout_logprobs, tokens.advantages)

    def describe(self) -> str:
        """Says that nothing limits the update."""
        return "Unregularized: importance-weighted policy gradient, nothing limits the update"
