"""How far the policy has moved from the one that sampled."""

import torch

from drpo_lightning.batch import RolloutBatch
from drpo_lightning.callbacks.update_statistics import TokenValues, UpdateStatistics
from drpo_lightning.functional import LOG_RATIO_CLAMP, importance_ratio, probability_shift
from drpo_lightning.metrics import TokenStatistics
from drpo_lightning.modules.policy import StepOutput


class PolicyShift(UpdateStatistics):
    """Logs the shift of the sampled tokens' probabilities, pi against mu.

    Scalars: `policy_shift/abs_mean`, `policy_shift/abs_max` (|pi - mu|), `policy_shift/mean` (pi - mu),
    `log_ratio/abs_mean`, `log_ratio/abs_max` (|log pi - log mu|, nats), `importance_ratio/mean`,
    `importance_ratio/max`, `log_ratio/beyond_clamp_fraction` (tokens without a gradient).
    Histograms: `histogram/probability_shift`, `histogram/log_ratio`.

    Args:
        every_n_updates: see `UpdateStatistics`.
        num_bins: bins of the histograms.
    """

    def __init__(self, every_n_updates: int | None = None, num_bins: int = 80) -> None:
        statistics = TokenStatistics(
            means=[
                "policy_shift/abs_mean",
                "policy_shift/mean",
                "log_ratio/abs_mean",
                "importance_ratio/mean",
                "log_ratio/beyond_clamp_fraction",
            ],
            maxima=["policy_shift/abs_max", "log_ratio/abs_max", "importance_ratio/max"],
            histograms={
                "histogram/probability_shift": torch.linspace(-1, 1, num_bins + 1),
                # Fine around 0, where nearly all tokens are, and out to the clamp.
                "histogram/log_ratio": LOG_RATIO_CLAMP * torch.linspace(-1, 1, num_bins + 1) ** 3,
            },
        )
        super().__init__(statistics, every_n_updates)

    def token_values(self, batch: RolloutBatch, outputs: StepOutput) -> TokenValues:
        """See `UpdateStatistics`."""
        pi, mu = outputs["policy_logprobs"], batch.rollout_logprobs
        shift, log_ratio, ratio = probability_shift(pi, mu), pi - mu, importance_ratio(pi, mu)
        values = {
            "policy_shift/abs_mean": shift.abs(),
            "policy_shift/abs_max": shift.abs(),
            "policy_shift/mean": shift,
            "log_ratio/abs_mean": log_ratio.abs(),
            "log_ratio/abs_max": log_ratio.abs(),
            "log_ratio/beyond_clamp_fraction": outputs["objective"].beyond_clamp,
            "importance_ratio/mean": ratio,
            "importance_ratio/max": ratio,
            "histogram/probability_shift": shift,
            "histogram/log_ratio": log_ratio,
        }
        return TokenValues(values, {})
