"""Means, extremes, quantiles and histograms over completion tokens."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from drpo_lightning.metrics.histogram import Histogram, bin_counts
from drpo_lightning.metrics.packed import PackedMetric


class TokenStatistics(PackedMetric):
    """Means, extremes, quantiles and histograms of per-token values.

    A token counts once, whatever micro-batch or rank it is in. NaN values are left out.

    Args:
        means: names of values whose mean is asked.
        maxima: names of values whose maximum is asked.
        minima: names of values whose minimum is asked.
        histograms: bin edges by name of the value, of at least 2 bins.
        quantiles: bin edges and the quantiles asked, in [0, 1], by name of the value. The 0.99-quantile of `x` is
            named `x_p99`, of `x/` it is `x/p99`. Its error is below the width of a bin, see `Histogram.quantile`; it
            is never beyond the extremes.
        subset_means: names of values whose mean is asked over all tokens, and over each subset under the name of the
            value followed by that of the subset.
        subsets: names of the subsets, masks that come with every micro-batch.

    Raises:
        ValueError: if a name comes twice, bins are too few or a quantile is out of range.
    """

    def __init__(
        self,
        means: Sequence[str] = (),
        maxima: Sequence[str] = (),
        minima: Sequence[str] = (),
        histograms: Mapping[str, Tensor] | None = None,
        quantiles: Mapping[str, tuple[Tensor, Sequence[float]]] | None = None,
        subset_means: Sequence[str] = (),
        subsets: Sequence[str] = (),
    ) -> None:
        histograms, quantiles = histograms or {}, quantiles or {}
        self._means, self._subset_means, self._subsets = list(means), list(subset_means), list(subsets)
        self._mean_keys = [*means, *(name + subset for name in subset_means for subset in ("", *subsets))]
        # A minimum is the maximum of the negated values.
        self._extremes = [(name, 1.0) for name in maxima] + [(name, -1.0) for name in minima]
        self._bounds = [(name, sign) for name in quantiles for sign in (1.0, -1.0)]
        self._quantiles = {name: {_quantile_key(name, q): q for q in shares} for name, (_, shares) in quantiles.items()}
        self._edges = {name: edges.double() for name, edges in histograms.items()}
        self._quantile_edges = {name: edges.double() for name, (edges, _) in quantiles.items()}
        self._check([*self._mean_keys, *maxima, *minima, *(key for keys in self._quantiles.values() for key in keys)])
        num_bins = sum(len(edges) + 1 for _, edges in self._grids)
        super().__init__(2 * len(self._mean_keys) + num_bins, len(self._extremes) + len(self._bounds))

    @property
    def _grids(self) -> list[tuple[str, Tensor]]:
        return [*self._edges.items(), *self._quantile_edges.items()]

    def _check(self, keys: list[str]) -> None:
        if repeated := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"every statistic needs a name of its own, got {repeated} twice")
        if short := [name for name, edges in self._grids if len(edges) < 3]:
            raise ValueError(f"the histogram of {short[0]!r} must have at least 2 bins")
        if wrong := [q for keys in self._quantiles.values() for q in keys.values() if not 0 <= q <= 1]:
            raise ValueError(f"a quantile must be in [0, 1], got {wrong[0]}")

    def update(self, values: Mapping[str, Tensor], subsets: Mapping[str, Tensor] | None = None) -> None:
        """Adds the tokens of one micro-batch.

        Args:
            values: per-token values by name, all of one shape; every token of them counts.
            subsets: True on the tokens of a subset, by name of the subset.
        """
        tokens = {name: value.flatten().double() for name, value in values.items()}
        masks = [subsets[name].flatten() for name in self._subsets] if subsets else []
        parts = [*_sums(tokens, self._means, []), *_sums(tokens, self._subset_means, masks)]
        for name, edges in self._grids:
            chosen = tokens[name][~tokens[name].isnan()]
            parts += [bin_counts(chosen, edges), torch.stack([chosen.sum(), chosen.square().sum()])]
        if parts:
            self.sums += torch.cat(parts)
        extremes = [sign * tokens[name] for name, sign in (*self._extremes, *self._bounds)]
        if extremes and extremes[0].numel():
            largest = torch.stack(extremes).nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(1)
            self.maxima = torch.maximum(self.maxima, largest)

    def compute(self) -> tuple[dict[str, float], dict[str, Histogram]]:
        """Means, extremes and quantiles by name, and histograms; a name without tokens is missing."""
        maxima = self.maxima.tolist()
        end = 2 * len(self._mean_keys)
        means = zip(self._mean_keys, self.sums[:end].view(-1, 2).tolist(), strict=True)
        scalars = {key: total / count for key, (total, count) in means if count}
        scalars |= {
            name: sign * value
            for (name, sign), value in zip(self._extremes, maxima, strict=False)
            if value > -torch.inf
        }
        histograms = self._histograms(end)
        bounds = maxima[len(self._extremes) :]
        for i, (keys, histogram) in enumerate(
            zip(self._quantiles.values(), histograms[len(self._edges) :], strict=True)
        ):
            if histogram.counts.any():
                high, low = bounds[2 * i], -bounds[2 * i + 1]
                scalars |= {key: min(max(histogram.quantile(q), low), high) for key, q in keys.items()}
        return scalars, dict(zip(self._edges, histograms, strict=False))

    def _histograms(self, start: int) -> list[Histogram]:
        """Those asked for, then those of the quantiles; their sums stand from `start` on."""
        histograms = []
        for _, edges in self._grids:
            end = start + len(edges) - 1
            total, total_squares = self.sums[end : end + 2].tolist()
            histograms.append(Histogram(edges, self.sums[start:end].cpu(), total, total_squares))
            start = end + 2
        return histograms


def _quantile_key(name: str, q: float) -> str:
    """`x_p99` for the 0.99-quantile of `x`, `x/p99` of `x/`."""
    return f"{name}{'' if name.endswith('/') else '_'}p{100 * q:02g}"


def _sums(tokens: Mapping[str, Tensor], names: list[str], subsets: list[Tensor]) -> list[Tensor]:
    """Sum and count of each value over all tokens and over each subset, NaN left out, as one vector; none of no names.

    Chosen by `where`, not multiplied by a mask: an infinite value elsewhere would make the sum NaN.
    """
    if not names:
        return []
    values = torch.stack([tokens[name] for name in names])[:, None]
    masks = torch.stack([torch.ones_like(values[0, 0], dtype=torch.bool), *subsets])
    chosen = masks & ~values.isnan()
    return [torch.stack([torch.where(chosen, values, 0.0).sum(-1), chosen.sum(-1).double()], -1).flatten()]
