"""Means, maxima and histograms over completion tokens."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from drpo_lightning.metrics.packed import PackedMetric


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


class TokenStatistics(PackedMetric):
    """Means, maxima and histograms of per-token values over the tokens that a mask selects.

    A token counts once, whatever micro-batch or rank it is in. NaN values are left out.

    Args:
        means: names of values whose mean is asked.
        maxima: names of values whose maximum is asked.
        minima: names of values whose minimum is asked.
        histograms: bin edges by name of the value, of at least 2 bins.

    Raises:
        ValueError: if a name comes twice or a histogram has too few bins.
    """

    def __init__(
        self,
        means: Sequence[str] = (),
        maxima: Sequence[str] = (),
        minima: Sequence[str] = (),
        histograms: Mapping[str, Tensor] | None = None,
    ) -> None:
        names = [*means, *maxima, *minima]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"every statistic needs a name of its own, got {repeated} twice")
        if short := [name for name, edges in (histograms or {}).items() if len(edges) < 3]:
            raise ValueError(f"the histogram of {short[0]!r} must have at least 2 bins")
        self._means = list(means)
        # A minimum is the maximum of the negated values.
        self._extremes = [(name, 1.0) for name in maxima] + [(name, -1.0) for name in minima]
        self._edges = {name: edges.double() for name, edges in (histograms or {}).items()}
        bins = sum(len(edges) + 1 for edges in self._edges.values())
        super().__init__(2 * len(self._means) + bins, len(self._extremes))

    def update(self, values: Mapping[str, Tensor], mask: Tensor, subsets: Mapping[str, Tensor] | None = None) -> None:
        """Adds one micro-batch.

        Args:
            values: per-token values by name, all of one shape.
            mask: True on the tokens that count.
            subsets: for a mean, a narrower mask than `mask`, by name of the value.
        """
        subsets = subsets or {}
        parts: list[Tensor] = []
        for name in self._means:
            chosen = _chosen(values[name], mask & subsets[name] if name in subsets else mask)
            parts.append(torch.stack([chosen.sum(), chosen.new_tensor(chosen.numel())]))
        for name, edges in self._edges.items():
            chosen = _chosen(values[name], mask)
            inner = edges[1:-1].to(chosen.device)
            counts = torch.bincount(torch.bucketize(chosen, inner, right=True), minlength=len(edges) - 1)
            parts += [counts.double(), torch.stack([chosen.sum(), chosen.square().sum()])]
        if parts:
            self.sums += torch.cat(parts)
        for i, (name, sign) in enumerate(self._extremes):
            chosen = _chosen(values[name], mask)
            if chosen.numel():
                self.maxima[i] = torch.maximum(self.maxima[i], (sign * chosen).max())

    def compute(self) -> tuple[dict[str, float], dict[str, Histogram]]:
        """Means, maxima and minima by name, and histograms; a name without tokens is missing."""
        sums, maxima = self.sums.tolist(), self.maxima.tolist()
        scalars = {name: sums[2 * i] / sums[2 * i + 1] for i, name in enumerate(self._means) if sums[2 * i + 1] > 0}
        scalars |= {
            name: sign * value for (name, sign), value in zip(self._extremes, maxima, strict=True) if value > -torch.inf
        }
        histograms, start = {}, 2 * len(self._means)
        for name, edges in self._edges.items():
            end = start + len(edges) - 1
            histograms[name] = Histogram(
                edges, torch.tensor(sums[start:end], dtype=torch.float64), sums[end], sums[end + 1]
            )
            start = end + 2
        return scalars, histograms


def _chosen(values: Tensor, mask: Tensor) -> Tensor:
    """The values under a mask, without NaN, as float64."""
    chosen = values[mask].double()
    return chosen[~chosen.isnan()]
