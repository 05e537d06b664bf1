"""What the objective does with the tokens: masks them, weakens, corrects or amplifies their gradient."""

import torch
from torch import Tensor

from drpo_lightning.batch import RolloutBatch
from drpo_lightning.callbacks.update_statistics import TokenValues, UpdateStatistics
from drpo_lightning.functional import probability_shift
from drpo_lightning.metrics import TokenStatistics
from drpo_lightning.modules.policy import StepOutput

REGION_RADIUS = 0.2
"""|pi - mu| beyond which a token counts as outside, for every objective alike."""
WEIGHT_TOLERANCE = 1e-3
"""How far a gradient weight must be from 1 to count as attenuated or amplified: more than two engines' rounding."""
SIGNS = ("", "_positive_adv", "_negative_adv")


class MaskStatistics(UpdateStatistics):
    """Logs gradient weights, masks and the region, over all completion tokens and by the sign of the advantage.

    For every objective: `grad_weight/mean`, `grad_weight/max`, `grad_weight/min`,
    `grad_weight/corrective_fraction` (w < 0), `grad_weight/attenuated_fraction` (0 <= w < 1),
    `grad_weight/amplified_fraction` (w > 1), over tokens with A != 0, differences from 1 up to 0.001 not counted;
    `region/outside_fraction` (|pi - mu| > 0.2 in the direction of the advantage); `histogram/grad_weight`. For
    objectives with a mask: `mask/fraction`, the share of tokens that it drops. A key that ends in `_positive_adv` or
    `_negative_adv` is the share among the tokens of that sign.

    Args:
        every_n_updates: see `UpdateStatistics`.
        max_weight: gradient weights of the histogram go from -max_weight to max_weight.
        num_bins: bins of the histogram.
    """

    def __init__(self, every_n_updates: int | None = None, max_weight: float = 8.0, num_bins: int = 80) -> None:
        fractions = (
            "mask/fraction",
            "grad_weight/corrective_fraction",
            "grad_weight/attenuated_fraction",
            "grad_weight/amplified_fraction",
            "region/outside_fraction",
        )
        statistics = TokenStatistics(
            means=["grad_weight/mean", *(name + sign for name in fractions for sign in SIGNS)],
            maxima=["grad_weight/max"],
            minima=["grad_weight/min"],
            histograms={"histogram/grad_weight": torch.linspace(-max_weight, max_weight, num_bins + 1)},
        )
        super().__init__(statistics, every_n_updates)

    def token_values(self, batch: RolloutBatch, outputs: StepOutput) -> TokenValues:
        """See `UpdateStatistics`."""
        objective = outputs["objective"]
        weight, advantages = objective.grad_weight, batch.advantages
        shift = probability_shift(outputs["policy_logprobs"], batch.rollout_logprobs)
        nowhere = torch.full_like(weight, torch.nan)
        fractions = {
            "mask/fraction": nowhere if objective.keep is None else (~objective.keep).float(),
            "grad_weight/corrective_fraction": _indicator(weight < 0, weight),
            "grad_weight/attenuated_fraction": _indicator((weight >= 0) & (weight < 1 - WEIGHT_TOLERANCE), weight),
            "grad_weight/amplified_fraction": _indicator(weight > 1 + WEIGHT_TOLERANCE, weight),
            "region/outside_fraction": ((shift.abs() > REGION_RADIUS) & (shift * advantages > 0)).float(),
        }
        masks = {"_positive_adv": advantages > 0, "_negative_adv": advantages < 0}
        values = {name + sign: value for name, value in fractions.items() for sign in SIGNS}
        values |= {
            "grad_weight/mean": weight,
            "grad_weight/max": weight,
            "grad_weight/min": weight,
            "histogram/grad_weight": weight,
        }
        subsets = {name + sign: mask for name in fractions for sign, mask in masks.items()}
        return TokenValues(values, subsets)


def _indicator(condition: Tensor, weight: Tensor) -> Tensor:
    """1 where the condition holds, 0 where not, NaN where the weight is not defined."""
    return torch.where(weight.isnan(), torch.nan, condition.float())
