"""The decoupled form of an objective: the trust region is around pi_prox, the samples are from mu."""

from dataclasses import dataclass
from typing import final

import torch

from drpo_lightning.functional.ratios import importance_ratio, within_log_ratio_clamp
from drpo_lightning.objectives.base import Objective, TokenInputs, TokenTerms


@final
@dataclass(frozen=True)
class Decoupled(Objective):
    """`sg(pi_prox / mu) J(pi, pi_prox)`: any ratio objective J with pi_prox in the place of mu.

    pi_prox is the trainer's own policy at the weights of the rollout, computed once more before the first update: the
    region no longer holds the mismatch of the two engines, which the factor pi_prox / mu corrects for.

        grad_weight w = the weight of J at (pi, pi_prox), times C / (pi_prox / mu) where that factor is cut at C

    Args:
        objective: J, of `ClippedRatio`, `DRPO`, `DPPO` and so on.
        max_ratio: C, the largest factor (truncated importance sampling); None does not cut it.

    Raises:
        ValueError: if the objective is itself decoupled, or over top-K divergences, which the engine gives of mu alone;
            if max_ratio is below 1.

    Source: Hilton et al., *Batch size-invariance for policy optimization*, arXiv 2110.00641, eq. 6; for language
    models AReaL, arXiv 2505.24298.
    """

    objective: Objective
    max_ratio: float | None = None

    def __post_init__(self) -> None:
        if not self.objective.required_inputs <= {"sequence_ids"}:
            raise ValueError(
                f"`objective` {type(self.objective).__name__} has no decoupled form: it needs "
                f"{sorted(self.objective.required_inputs)}"
            )
        if self.max_ratio is not None and not self.max_ratio >= 1:
            raise ValueError(f"`max_ratio` must be at least 1, got {self.max_ratio}")

    @property
    def required_inputs(self) -> frozenset[str]:
        """See `Objective.required_inputs`."""
        return self.objective.required_inputs | {"proximal_logprobs"}

    @property
    def uses_importance_ratio(self) -> bool:
        """See `Objective.uses_importance_ratio`."""
        return True

    @property
    def has_mask(self) -> bool:
        """See `Objective.has_mask`."""
        return self.objective.has_mask

    def terms(self, tokens: TokenInputs) -> TokenTerms:
        """The terms of J around pi_prox, times the factor."""
        assert tokens.proximal_logprobs is not None
        inner = self.objective.terms(tokens._replace(rollout_logprobs=tokens.proximal_logprobs))
        factor = importance_ratio(tokens.proximal_logprobs, tokens.rollout_logprobs)
        if self.max_ratio is not None:
            factor = factor.clamp(max=self.max_ratio)
        # J's clamp is around pi_prox; that of every objective, beyond which a token has no gradient, is around mu.
        in_clamp = within_log_ratio_clamp(tokens.policy_logprobs, tokens.rollout_logprobs)
        in_inner_clamp = within_log_ratio_clamp(tokens.policy_logprobs, tokens.proximal_logprobs)
        objective = factor * torch.where(in_clamp, inner.objective, inner.objective.detach())
        return TokenTerms(objective, factor * inner.grad_coefficient * in_inner_clamp, inner.keep)

    def describe(self) -> str:
        """The inner objective and the cut."""
        cut = "" if self.max_ratio is None else f", pi_prox / mu cut at {self.max_ratio:g}"
        return f"Decoupled, around the trainer's own policy at the rollout{cut}: {self.objective.describe()}"
