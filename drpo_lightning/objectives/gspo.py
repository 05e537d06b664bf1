"""GSPO: the clipped ratio of whole sequences."""

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from drpo_lightning.functional.ratios import log_importance_ratio
from drpo_lightning.objectives.base import Objective, TokenInputs, TokenTerms


def gspo(
    policy_logprobs: Float[Tensor, "*tokens"],
    rollout_logprobs: Float[Tensor, "*tokens"],
    advantages: Float[Tensor, "*tokens"],
    completion_mask: Bool[Tensor, "*tokens"],
    sequence_ids: Int[Tensor, "*tokens"],
    *,
    clip_low: float,
    clip_high: float,
) -> TokenTerms:
    """Group Sequence Policy Optimization: `min(s A, clip(s, 1 - clip_low, 1 + clip_high) A)` for every token.

    s is the geometric mean of the ratios of the token's sequence, `s = exp(mean(log pi - log mu))`.

        grad_weight w = s / r, 0 where s has left its range in the direction of A

    In the token form of the paper, whose gradient reaches each token through its own logprob; with
    `seq_mean_token_mean` value and gradient are those of the sequence form.

    Args:
        policy_logprobs: log pi in nats.
        rollout_logprobs: log mu in nats.
        advantages: A, in units of reward, equal within a sequence.
        completion_mask: True on the tokens that count in s.
        sequence_ids: number of the sequence that a token belongs to, from 0.
        clip_low: how far s may fall below 1, without unit.
        clip_high: how far s may rise above 1, without unit.

    Returns:
        Objective, its derivative `s A`, and the tokens of sequences that are not clipped as `keep`.

    Source: Zheng et al., arXiv 2507.18071, eq. 5, 7 and 13.
    """
    log_ratio = log_importance_ratio(policy_logprobs, rollout_logprobs)
    with torch.no_grad():
        ids, mask = sequence_ids.flatten(), completion_mask.flatten()
        size = int(ids.max()) + 1 if ids.numel() else 0
        totals = log_ratio.new_zeros(size).index_add_(0, ids, torch.where(mask, log_ratio.flatten(), 0.0))
        lengths = log_ratio.new_zeros(size).index_add_(0, ids, mask.to(log_ratio.dtype))
        ratio = (totals / lengths.clamp(min=1)).exp()[ids].view_as(log_ratio)
        clipped = ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))
    # Has the value of s and, by way of this token's own logprob, its gradient.
    token_ratio = ratio * (log_ratio - log_ratio.detach()).exp()
    bounded = token_ratio.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(token_ratio * advantages, bounded * advantages)
    return TokenTerms(objective, torch.where(clipped, 0.0, ratio * advantages), ~clipped)


@final
@dataclass(frozen=True)
class GSPO(Objective):
    """Group Sequence Policy Optimization, arXiv 2507.18071. See `gspo` for the formula.

    Args:
        clip_low: how far the sequence's ratio may fall below 1, in (0, 1).
        clip_high: how far the sequence's ratio may rise above 1.

    Raises:
        ValueError: if a bound is out of range.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4

    def __post_init__(self) -> None:
        if not 0 < self.clip_low < 1:
            raise ValueError(f"`clip_low` must be in (0, 1), got {self.clip_low}")
        if not self.clip_high > 0:
            raise ValueError(f"`clip_high` must be positive, got {self.clip_high}")

    @property
    def required_inputs(self) -> frozenset[str]:
        """See `Objective.required_inputs`."""
        return frozenset({"sequence_ids"})

    @property
    def has_mask(self) -> bool:
        """See `Objective.has_mask`."""
        return True

    def terms(self, tokens: TokenInputs) -> TokenTerms:
        """See `gspo`."""
        assert tokens.sequence_ids is not None
        return gspo(
            tokens.policy_logprobs,
            tokens.rollout_logprobs,
            tokens.advantages,
            tokens.completion_mask,
            tokens.sequence_ids,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
        )

    def describe(self) -> str:
        """The range in numbers."""
        return f"GSPO: ratio of a sequence clipped to [{1 - self.clip_low:g}, {1 + self.clip_high:g}]"
