"""An objective of one's own, and its gradient weight.

    python examples/custom_objective.py

Any gradient weight w makes an objective: `sg(w r A) log r` has the gradient `w r A grad log pi`, sg without a gradient.
This one fades out smoothly, by a Gaussian of the probability shift, where the update diverges, and never corrects. In a
configuration: `--model.objective my_module.GaussianRegion --model.objective.delta 0.1`.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from drpo_lightning.functional import importance_ratio, log_importance_ratio, probability_shift
from drpo_lightning.objectives import DPPO, DRPO, Objective
from drpo_lightning.objectives.base import TokenInputs, TokenTerms


def gaussian_region(
    policy_logprobs: Tensor, rollout_logprobs: Tensor, advantages: Tensor, *, delta: float
) -> TokenTerms:
    """`w = exp(-(pi - mu)^2 / (2 delta^2))` where the update diverges, A (pi - mu) > 0, else 1."""
    shift = probability_shift(policy_logprobs, rollout_logprobs).detach()
    weight = torch.where(advantages * shift > 0, torch.exp(-(shift / delta).square() / 2), 1.0)
    coefficient = importance_ratio(policy_logprobs, rollout_logprobs).detach() * advantages * weight
    return TokenTerms(coefficient * log_importance_ratio(policy_logprobs, rollout_logprobs), coefficient)


@final
@dataclass(frozen=True)
class GaussianRegion(Objective):
    """A smooth region around mu.

    Args:
        delta: width of the region, in units of probability.

    Raises:
        ValueError: if delta is not positive.
    """

    delta: float = 0.1

    def __post_init__(self) -> None:
        if not self.delta > 0:
            raise ValueError(f"`delta` must be positive, got {self.delta}")

    def terms(self, tokens: TokenInputs) -> TokenTerms:
        """See `gaussian_region`."""
        return gaussian_region(tokens.policy_logprobs, tokens.rollout_logprobs, tokens.advantages, delta=self.delta)

    def describe(self) -> str:
        """What a run says at its start."""
        return f"GaussianRegion(delta={self.delta:g}): updates fade out beyond |pi - mu| = {self.delta:g}"


def main() -> None:
    """Prints w along a shift, beside those of DRPO and DPPO, and holds it against autograd."""
    mu = torch.full((5,), 0.4)
    policy_logprobs = torch.tensor([0.3, 0.4, 0.5, 0.6, 0.8]).log().requires_grad_()
    advantages, mask = torch.ones(5), torch.ones(5, dtype=torch.bool)
    print("pi - mu          " + "".join(f"{shift:8.2f}" for shift in (policy_logprobs.exp() - mu).tolist()))
    for objective in (GaussianRegion(delta=0.1), DRPO(delta=0.15), DPPO(threshold=0.15)):
        output = objective(policy_logprobs, mu.log(), advantages, mask)
        (gradient,) = torch.autograd.grad(output.loss.sum(), policy_logprobs)
        torch.testing.assert_close(-gradient, output.grad_coefficient)
        print(f"{type(objective).__name__:17}" + "".join(f"{weight:8.2f}" for weight in output.grad_weight.tolist()))


if __name__ == "__main__":
    main()
