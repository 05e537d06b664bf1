"""Quantiles of a histogram: in the right bin, and as good as the bins are fine."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drpo_lightning.metrics import Histogram, geometric_edges
from drpo_lightning.metrics.histogram import bin_counts


def histogram_of(values, edges):
    values = torch.as_tensor(values, dtype=torch.float64)
    return Histogram(edges, bin_counts(values, edges), float(values.sum()), float(values.square().sum()))


def exact_quantile(values, q):
    return sorted(values)[max(math.ceil(q * len(values)), 1) - 1]


@given(
    st.lists(st.floats(0, 0.999), min_size=1, max_size=60), st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.75, 0.9, 0.99, 1.0])
)
def test_a_quantile_lies_in_the_bin_of_the_exact_one(values, q):
    edges = torch.linspace(0, 1, 9)
    found, exact = histogram_of(values, edges).quantile(q), exact_quantile(values, q)
    lower = math.floor(exact * 8) / 8
    assert lower <= found <= lower + 1 / 8


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 0.1])
@pytest.mark.parametrize("q", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_geometric_bins_tell_a_quantile_to_within_two_and_a_half_per_cent(scale, q):
    values = scale * np.random.default_rng(0).exponential(size=5000)
    found = histogram_of(values, geometric_edges(1e-7, 20.0)).quantile(q)
    assert found == pytest.approx(np.quantile(values, q, method="inverted_cdf"), rel=0.024, abs=1e-7)


def test_linear_between_the_edges_worked_by_hand():
    histogram = Histogram(torch.tensor([0.0, 1.0, 3.0, 7.0]), torch.tensor([2.0, 0.0, 2.0]), 0.0, 0.0)
    expected = {0.0: 0.0, 0.25: 0.5, 0.5: 1.0, 0.75: 5.0, 1.0: 7.0}
    assert {q: histogram.quantile(q) for q in expected} == expected


def test_what_lies_outside_the_edges_counts_in_the_outer_bins():
    edges = torch.tensor([0.0, 1.0, 2.0])
    assert bin_counts(torch.tensor([[-5.0, 0.0], [1.0, math.inf]]), edges).tolist() == [2, 2]
    assert histogram_of([5.0], edges).quantile(1.0) == 2.0


def test_geometric_edges_begin_at_0_and_reach_the_top():
    edges = geometric_edges(1e-3, 20.0)
    assert edges[0] == 0
    assert [edges[1].item(), edges[-1].item()] == pytest.approx([1e-3, 20.0], rel=1e-12)
    ratios = (edges[2:] / edges[1:-1]).tolist()
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-9)
    assert max(ratios) < 1.024


@pytest.mark.parametrize("q", [-0.1, 1.1, math.nan])
def test_a_share_out_of_range_is_refused(q):
    with pytest.raises(ValueError, match=rf"`q` must be in \[0, 1\], got {q}"):
        histogram_of([0.5], torch.tensor([0.0, 1.0, 2.0])).quantile(q)


def test_an_empty_histogram_has_no_quantiles():
    with pytest.raises(ValueError, match="empty histogram"):
        histogram_of([], torch.tensor([0.0, 1.0, 2.0])).quantile(0.5)
