"""Statistics that stay right over micro-batches and ranks."""

from drpo_lightning.metrics.histogram import Histogram, geometric_edges
from drpo_lightning.metrics.logprob_comparison import LogprobComparison
from drpo_lightning.metrics.packed import PackedMetric
from drpo_lightning.metrics.token_statistics import TokenStatistics
from drpo_lightning.metrics.validation import ValidationStatistics, pass_at_k

__all__ = [
    "Histogram",
    "LogprobComparison",
    "PackedMetric",
    "TokenStatistics",
    "ValidationStatistics",
    "geometric_edges",
    "pass_at_k",
]
