"""How far two sets of logprobs of the same sampled tokens lie apart."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from drpo_lightning.functional import LOG_RATIO_CLAMP, log_importance_ratio, probability_shift
from drpo_lightning.metrics.histogram import Histogram, bin_counts, geometric_edges
from drpo_lightning.metrics.packed import PackedMetric

LOG_RATIO_EDGES = geometric_edges(1e-7, LOG_RATIO_CLAMP)
SHIFT_EDGES = geometric_edges(1e-8, 1.0)
SMALLEST_VARIANCE = 1e-12
"""Variance over mean square below which float64 sums cannot tell a variable from a constant."""
SUMS = ("tokens", "k1", "k3", "chi2", "log_ratio", "shift", "ratio", "ratio_squares", "p", "q", "pp", "qq", "pq")


class LogprobComparison(PackedMetric):
    """Compares log p with log q of tokens that were sampled from q, with r = p / q.

    `k1_kl` (mean of -log r) and `k3_kl` (mean of r - 1 - log r) estimate KL(q || p), in nats; `chi2` (mean of
    r^2 - 1) estimates the chi-square divergence of p from q; `log_ratio_abs_mean`, `_p99`, `_max` are of |log r|, in
    nats; `shift_abs_mean`, `_p99`, `_max` of |p - q|, in units of probability; `effective_sample_size` is
    (sum r)^2 / (n sum r^2), the share in (0, 1] of the n tokens that importance sampling is left with; `pearson` is the
    correlation of p and q over tokens; `perplexity_ratio` is exp(mean(-log p) - mean(-log q)).

    The log-ratio is clamped to +-20 in all of them, as in `importance_ratio`: everything is finite. Tokens with a NaN
    are left out. A 99 % quantile is off by less than 2.4 % of itself, or by less than 1e-7 nats and 1e-8 in
    probability. `pearson` is missing if p or q is constant, up to one part in a million.
    """

    def __init__(self) -> None:
        super().__init__(len(SUMS) + len(LOG_RATIO_EDGES) + len(SHIFT_EDGES) - 2, 2)

    def update(self, logprobs: Float[Tensor, "*tokens"], sampling_logprobs: Float[Tensor, "*tokens"]) -> None:
        """Adds the tokens of one micro-batch.

        Args:
            logprobs: log p, in nats.
            sampling_logprobs: log q, in nats.
        """
        log_p, log_q = logprobs.double().flatten(), sampling_logprobs.double().flatten()
        defined = ~(log_p - log_q).isnan()
        log_p, log_q = log_p[defined], log_q[defined]
        p, q = log_p.exp(), log_q.exp()
        log_ratio = log_importance_ratio(log_p, log_q)
        ratio, distance = log_ratio.exp(), log_ratio.abs()
        shift = probability_shift(log_p, log_q).abs()
        rows = {
            "tokens": torch.ones_like(p),
            "k1": -log_ratio,
            "k3": torch.expm1(log_ratio) - log_ratio,
            "chi2": torch.expm1(2 * log_ratio),
            "log_ratio": distance,
            "shift": shift,
            "ratio": ratio,
            "ratio_squares": ratio.square(),
            "p": p,
            "q": q,
            "pp": p * p,
            "qq": q * q,
            "pq": p * q,
        }
        sums = torch.stack([rows[name] for name in SUMS]).sum(1)
        self.sums += torch.cat([sums, bin_counts(distance, LOG_RATIO_EDGES), bin_counts(shift, SHIFT_EDGES)])
        if len(p):
            self.maxima = torch.maximum(self.maxima, torch.stack([distance.max(), shift.max()]))

    def compute(self) -> dict[str, float]:
        """The statistics by name; empty without tokens."""
        packed, start = self.sums.cpu(), len(SUMS)
        end = start + len(LOG_RATIO_EDGES) - 1
        sums = dict(zip(SUMS, packed[:start].tolist(), strict=True))
        tokens = sums["tokens"]
        if not tokens:
            return {}
        log_ratio_max, shift_max = self.maxima.tolist()
        return {
            "k1_kl": sums["k1"] / tokens,
            "k3_kl": sums["k3"] / tokens,
            "chi2": sums["chi2"] / tokens,
            "log_ratio_abs_mean": sums["log_ratio"] / tokens,
            "log_ratio_abs_p99": _p99(LOG_RATIO_EDGES, packed[start:end], log_ratio_max),
            "log_ratio_abs_max": log_ratio_max,
            "shift_abs_mean": sums["shift"] / tokens,
            "shift_abs_p99": _p99(SHIFT_EDGES, packed[end:], shift_max),
            "shift_abs_max": shift_max,
            "effective_sample_size": min(sums["ratio"] ** 2 / (tokens * sums["ratio_squares"]), 1.0),
            "perplexity_ratio": math.exp(sums["k1"] / tokens),
            **_pearson(sums),
        }


def _p99(edges: Tensor, counts: Tensor, largest: float) -> float:
    return min(Histogram(edges, counts, math.nan, math.nan).quantile(0.99), largest)


def _pearson(sums: dict[str, float]) -> dict[str, float]:
    """The correlation, under its name; nothing if a variance is 0."""
    p, q, pp, qq, pq = (sums[name] / sums["tokens"] for name in ("p", "q", "pp", "qq", "pq"))
    variance_p, variance_q = pp - p * p, qq - q * q
    if variance_p <= SMALLEST_VARIANCE * pp or variance_q <= SMALLEST_VARIANCE * qq:
        return {}
    return {"pearson": max(-1.0, min(1.0, (pq - p * q) / math.sqrt(variance_p * variance_q)))}
