"""Counts between fixed edges, which add up over micro-batches and ranks, and the quantiles that they give."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

BINS_PER_DECADE = 100
"""Bins of `geometric_edges` from a value to its tenfold: each is 2.3 % wide."""


class Histogram(NamedTuple):
    """Counts between fixed edges; what lies outside counts in the first or last bin.

    Attributes:
        edges: bin edges in ascending order, one more than there are bins.
        counts: tokens per bin.
        total: sum of the values.
        total_squares: sum of the squared values.
    """

    edges: Tensor
    counts: Tensor
    total: float
    total_squares: float

    def quantile(self, q: float) -> float:
        """The value that a share q of the n values does not exceed.

        It lies in the bin of the exact quantile, the ceil(q n)-th smallest value, and is interpolated linearly inside
        that bin: it is off by less than the bin's width. A quantile outside the edges is the outermost edge.

        Args:
            q: share, in [0, 1].

        Raises:
            ValueError: if q is out of range or the histogram is empty.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"`q` must be in [0, 1], got {q}")
        below = self.counts.double().cumsum(0)
        num_values = float(below[-1])
        if not num_values:
            raise ValueError("an empty histogram has no quantiles")
        rank = q * num_values
        i = int(torch.searchsorted(below, max(rank, 1.0)))
        in_bin = float(self.counts[i])
        share = max(rank - float(below[i]) + in_bin, 0.0) / in_bin
        return torch.lerp(self.edges[i].double(), self.edges[i + 1].double(), share).item()


def bin_counts(values: Tensor, edges: Tensor) -> Tensor:
    """Values per bin, float64. A bin holds its lower edge; what lies outside counts in the first or last bin.

    Args:
        values: of any shape, without NaN.
        edges: bin edges in ascending order.
    """
    bins = torch.bucketize(values.flatten(), edges[1:-1].to(values.device), right=True)
    return torch.bincount(bins, minlength=len(edges) - 1).double()


def geometric_edges(low: float, high: float) -> Tensor:
    """Edges 0, low, ..., high for values >= 0: a quantile between low and high is off by less than 2.4 % of itself.

    Args:
        low: below it a quantile is off by less than `low`.
        high: largest quantile that can be told.
    """
    num_bins = math.ceil(BINS_PER_DECADE * math.log10(high / low))
    edges = torch.logspace(math.log10(low), math.log10(high), num_bins + 1, dtype=torch.float64)
    return torch.cat([edges.new_zeros(1), edges])
