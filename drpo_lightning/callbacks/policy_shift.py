"""How far the policy has moved from the one that sampled."""

import torch

from drpo_lightning.callbacks.update_statistics import CompletionTokens, TokenValues, UpdateStatistics
from drpo_lightning.functional import LOG_RATIO_CLAMP, importance_ratio, probability_shift
from drpo_lightning.metrics import TokenStatistics, geometric_edges

THRESHOLDS = (0.05, 0.1, 0.2, 0.5)
"""|pi - mu| that tokens are counted beyond, whatever the objective: its own radius may be out of reach."""


class PolicyShift(UpdateStatistics):
    """Logs the shift of the sampled tokens' probabilities, pi against mu.

    Scalars: `policy_shift/abs_mean`, `policy_shift/abs_p99`, `policy_shift/abs_max` (|pi - mu|),
    `policy_shift/beyond_<t>_fraction` (share of tokens with |pi - mu| > t, for t = 0.05, 0.1, 0.2, 0.5),
    `policy_shift/mean` (pi - mu), `log_ratio/abs_mean`, `log_ratio/abs_max` (|log pi - log mu|, nats),
    `importance_ratio/mean`, `importance_ratio/max`, `log_ratio/beyond_clamp_fraction` (tokens without a gradient),
    `entropy/rollout` (mean of -log mu, nats: an unbiased estimate of the entropy of mu at the sampled places).
    Histograms: `histogram/probability_shift`, `histogram/log_ratio`.

    `policy_shift/abs_p99` is off by less than 2.4 % of itself, or by less than 1e-6.

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
                "entropy/rollout",
                *(_beyond(threshold) for threshold in THRESHOLDS),
            ],
            maxima=["policy_shift/abs_max", "log_ratio/abs_max", "importance_ratio/max"],
            histograms={
                "histogram/probability_shift": torch.linspace(-1, 1, num_bins + 1),
                # Fine around 0, where nearly all tokens are, and out to the clamp.
                "histogram/log_ratio": LOG_RATIO_CLAMP * torch.linspace(-1, 1, num_bins + 1) ** 3,
            },
            quantiles={"policy_shift/abs": (geometric_edges(1e-6, 1.0), [0.99])},
        )
        super().__init__(statistics, every_n_updates)

    def token_values(self, tokens: CompletionTokens) -> TokenValues:
        """See `UpdateStatistics`."""
        pi, mu = tokens.policy_logprobs, tokens.rollout_logprobs
        shift, log_ratio, ratio = probability_shift(pi, mu), pi - mu, importance_ratio(pi, mu)
        distance = shift.abs()
        values = {
            "policy_shift/abs": distance,
            "policy_shift/abs_mean": distance,
            "policy_shift/abs_max": distance,
            "policy_shift/mean": shift,
            "log_ratio/abs_mean": log_ratio.abs(),
            "log_ratio/abs_max": log_ratio.abs(),
            "log_ratio/beyond_clamp_fraction": tokens.beyond_clamp,
            "importance_ratio/mean": ratio,
            "importance_ratio/max": ratio,
            "entropy/rollout": -mu,
            "histogram/probability_shift": shift,
            "histogram/log_ratio": log_ratio,
        }
        return TokenValues(values | {_beyond(threshold): distance > threshold for threshold in THRESHOLDS}, {})


def _beyond(threshold: float) -> str:
    return f"policy_shift/beyond_{threshold:g}_fraction"
