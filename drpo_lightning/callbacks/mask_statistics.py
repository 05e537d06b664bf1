"""What the objective does with the tokens: masks them, weakens, corrects or amplifies their gradient."""

import torch
from torch import Tensor

from drpo_lightning.callbacks.update_statistics import CompletionTokens, TokenValues, UpdateStatistics
from drpo_lightning.functional import probability_shift
from drpo_lightning.metrics import TokenStatistics, geometric_edges

REGION_RADIUS = 0.2
"""|pi - mu| beyond which a token counts as outside, for every objective alike."""
WEIGHT_TOLERANCE = 1e-3
"""How far a gradient weight must be from 1 to count as attenuated or amplified: more than two engines' rounding."""
RARE = 0.01
"""Largest mu of a rare token."""
COMMON = 0.9
"""Least mu of a common token."""
SUBSETS = ("_positive_adv", "_negative_adv", "_rare", "_middle", "_common")
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)


class MaskStatistics(UpdateStatistics):
    """Logs gradient weights, masks and the region: over all completion tokens, by the sign of A, and by mu.

    For every objective: `grad_weight/mean`, `grad_weight/corrective_fraction` (w < 0),
    `grad_weight/attenuated_fraction` (0 <= w < 1), `grad_weight/amplified_fraction` (w > 1), over tokens with A != 0,
    differences from 1 up to 0.001 not counted; `region/outside_fraction` (|pi - mu| > 0.2 in the direction of the
    advantage). For objectives with a mask: `mask/fraction`, the share of tokens that it drops. The same among the
    tokens of one kind has the kind at its end: `_positive_adv`, `_negative_adv`, `_rare` (mu <= 0.01), `_middle`,
    `_common` (mu >= 0.9).

    Besides, over all tokens: `grad_weight/max`, `grad_weight/min`, the quantiles `grad_weight/p01`, `p10`, `p50`,
    `p90`, `p99` (off by less than 2.4 % of their distance from 1, or by less than 1e-6; a distance above 1000 reads
    as 1000), `histogram/grad_weight`, and the share of the tokens that are `tokens/rare_fraction`,
    `tokens/middle_fraction`, `tokens/common_fraction`.

    Args:
        every_n_updates: see `UpdateStatistics`.
        max_weight: gradient weights of the histogram go from -max_weight to max_weight.
        num_bins: bins of the histogram.
    """

    def __init__(self, every_n_updates: int | None = None, max_weight: float = 8.0, num_bins: int = 80) -> None:
        distances = geometric_edges(1e-6, 1e3)
        statistics = TokenStatistics(
            means=["tokens/rare_fraction", "tokens/middle_fraction", "tokens/common_fraction"],
            subset_means=[
                "grad_weight/mean",
                "mask/fraction",
                "grad_weight/corrective_fraction",
                "grad_weight/attenuated_fraction",
                "grad_weight/amplified_fraction",
                "region/outside_fraction",
            ],
            subsets=SUBSETS,
            maxima=["grad_weight/max"],
            minima=["grad_weight/min"],
            histograms={"histogram/grad_weight": torch.linspace(-max_weight, max_weight, num_bins + 1)},
            quantiles={"grad_weight/": (torch.cat([1 - distances[1:].flip(0), 1 + distances]), QUANTILES)},
        )
        super().__init__(statistics, every_n_updates)

    def token_values(self, tokens: CompletionTokens) -> TokenValues:
        """See `UpdateStatistics`."""
        weight, advantages, mu = tokens.grad_weight, tokens.advantages, tokens.rollout_logprobs.exp()
        shift = probability_shift(tokens.policy_logprobs, tokens.rollout_logprobs)
        rare, common = mu <= RARE, mu >= COMMON
        middle = ~(rare | common)
        values = {
            "grad_weight/": weight,
            "grad_weight/mean": weight,
            "grad_weight/max": weight,
            "grad_weight/min": weight,
            "histogram/grad_weight": weight,
            "grad_weight/corrective_fraction": _indicator(weight < 0, weight),
            "grad_weight/attenuated_fraction": _indicator((weight >= 0) & (weight < 1 - WEIGHT_TOLERANCE), weight),
            "grad_weight/amplified_fraction": _indicator(weight > 1 + WEIGHT_TOLERANCE, weight),
            "mask/fraction": torch.full_like(weight, torch.nan) if tokens.keep is None else ~tokens.keep,
            "region/outside_fraction": (shift.abs() > REGION_RADIUS) & (shift * advantages > 0),
            "tokens/rare_fraction": rare,
            "tokens/middle_fraction": middle,
            "tokens/common_fraction": common,
        }
        masks = (advantages > 0, advantages < 0, rare, middle, common)
        return TokenValues(values, dict(zip(SUBSETS, masks, strict=True)))


def _indicator(condition: Tensor, weight: Tensor) -> Tensor:
    """1 where the condition holds, 0 where not, NaN where the weight is not defined."""
    return torch.where(weight.isnan(), torch.nan, condition.float())
