"""DRPO: the importance-weighted policy gradient under a smooth, advantage-weighted trust region."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from drpo_lightning.functional.ratios import importance_ratio, probability_shift
from drpo_lightning.objectives.base import Objective, TokenInputs, TokenTerms


def drpo(
    policy_logprobs: Float[Tensor, "*tokens"],
    rollout_logprobs: Float[Tensor, "*tokens"],
    advantages: Float[Tensor, "*tokens"],
    *,
    delta: float,
    scale_by_advantage: bool = True,
) -> TokenTerms:
    """Divergence Regularized Policy Optimization: `r A - |A| mu (r - 1)^2 / (2 delta)` per token.

    This is SPO with the token's own range epsilon = delta / mu, which bounds |pi - mu| instead of |r - 1|:

        grad_weight w = 1 - sign(A) (pi - mu) / delta

    An update that diverges, A (r - 1) > 0, fades out as |pi - mu| nears delta and is corrected (w < 0) beyond it; one
    that converges is amplified (w > 1). w is in [1 - 1/delta, 1 + 1/delta] and continuous.

    Args:
        policy_logprobs: log pi in nats.
        rollout_logprobs: log mu in nats.
        advantages: A, in units of reward.
        delta: trust-region radius, in units of probability.
        scale_by_advantage: False leaves |A| out of the penalty, an ablation: `w = 1 - (pi - mu) / (delta A)`, so that
            the region shrinks with |A|, and tokens with A = 0 are pulled back to mu.

    Returns:
        Objective and its derivative `r A w`. At pi = mu they are A and A. At A = 0 both are 0, if scaled by |A|.

    Source: Yao et al., *Rethinking the Divergence Regularization in LLM RL*, arXiv 2606.09821.
    """
    ratio = importance_ratio(policy_logprobs, rollout_logprobs)
    shift = probability_shift(policy_logprobs, rollout_logprobs)
    scale = advantages.abs() if scale_by_advantage else torch.ones_like(advantages)
    penalty = scale * rollout_logprobs.exp() * (ratio - 1).square() / (2 * delta)
    coefficient = ratio.detach() * (advantages - scale * shift.detach() / delta)
    return TokenTerms(ratio * advantages - penalty, coefficient)


@final
@dataclass(frozen=True)
class DRPO(Objective):
    """Divergence Regularized Policy Optimization, arXiv 2606.09821. See `drpo` for the formula.

    Args:
        delta: trust-region radius in units of probability. The paper's experiments use 12.5, the default. Since
            |pi - mu| <= 1, a delta >= 1 cannot be reached: w stays in [1 - 1/delta, 1 + 1/delta] and never corrects
            (reweighting regime). 0.15 to 0.2 gives the region of DPPO, with corrective tokens beyond it (trust-region
            regime). In this project's study (docs/study.md) 0.2 learned a little faster than 12.5 on a small model,
            and not at all on a language model whose fp8 engine alone shifted some tokens by as much as delta.
        scale_by_advantage: False leaves |A| out of the penalty; the paper finds that unstable.

    Raises:
        ValueError: if delta is not positive.
    """

    delta: float = 12.5
    scale_by_advantage: bool = True

    def __post_init__(self) -> None:
        if not self.delta > 0:
            raise ValueError(
                f"`delta` must be positive, in units of probability, got {self.delta}; the paper uses 12.5, "
                "0.2 gives DPPO's region"
            )

    def terms(self, tokens: TokenInputs) -> TokenTerms:
        """See `drpo`."""
        return drpo(
            tokens.policy_logprobs,
            tokens.rollout_logprobs,
            tokens.advantages,
            delta=self.delta,
            scale_by_advantage=self.scale_by_advantage,
        )

    def describe(self) -> str:
        """The regime that delta puts the run in."""
        if not self.scale_by_advantage:
            return (
                f"DRPO(delta={self.delta:g}) with a penalty that is not scaled by |A|: updates fade out towards "
                f"|pi - mu| = {self.delta:g} |A| and are corrected beyond it; gradient weights have no bound"
            )
        low, high = 1 - 1 / self.delta, 1 + 1 / self.delta
        if self.delta >= 1:
            return (
                f"DRPO(delta={self.delta:g}): reweighting regime, the boundary |pi - mu| = delta cannot be reached; "
                f"gradient weights stay in [{low:.3g}, {high:.3g}]"
            )
        return (
            f"DRPO(delta={self.delta:g}): trust-region regime, updates fade out towards |pi - mu| = {self.delta:g} "
            f"and are corrected beyond it; gradient weights in [{low:.3g}, {high:.3g}]"
        )
