"""Pure functions of tensors: ratios, divergences, advantages, aggregation, token logprobs."""

from drpo_lightning.functional.advantages import ADVANTAGES, group_advantages
from drpo_lightning.functional.aggregation import AGGREGATIONS, aggregate_loss
from drpo_lightning.functional.divergences import (
    TopKLogprobs,
    binary_kl_divergence,
    binary_tv_divergence,
    k1_divergence,
    k3_divergence,
    topk_kl_divergence,
    topk_tv_divergence,
)
from drpo_lightning.functional.linear_logprobs import linear_token_entropies, linear_token_logprobs
from drpo_lightning.functional.logprobs import sampling_logprobs
from drpo_lightning.functional.ratios import (
    LOG_RATIO_CLAMP,
    importance_ratio,
    log_importance_ratio,
    probability_shift,
    within_log_ratio_clamp,
)
from drpo_lightning.functional.reference_kl import (
    has_reference_gradient,
    reference_kl,
    reference_penalty,
)

__all__ = [
    "ADVANTAGES",
    "AGGREGATIONS",
    "LOG_RATIO_CLAMP",
    "TopKLogprobs",
    "aggregate_loss",
    "binary_kl_divergence",
    "binary_tv_divergence",
    "group_advantages",
    "has_reference_gradient",
    "importance_ratio",
    "k1_divergence",
    "k3_divergence",
    "linear_token_entropies",
    "linear_token_logprobs",
    "log_importance_ratio",
    "probability_shift",
    "reference_kl",
    "reference_penalty",
    "sampling_logprobs",
    "topk_kl_divergence",
    "topk_tv_divergence",
    "within_log_ratio_clamp",
]
