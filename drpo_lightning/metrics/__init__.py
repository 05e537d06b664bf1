"""Statistics that stay right over micro-batches and ranks."""

from drpo_lightning.metrics.packed import PackedMetric
from drpo_lightning.metrics.token_statistics import Histogram, TokenStatistics
from drpo_lightning.metrics.validation import ValidationStatistics, pass_at_k

__all__ = ["Histogram", "PackedMetric", "TokenStatistics", "ValidationStatistics", "pass_at_k"]
