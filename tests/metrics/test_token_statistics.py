"""Token statistics: the same numbers however the tokens are split, and in whatever precision the module is."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from drpo_lightning.metrics import TokenStatistics

EDGES = [-2.0, -0.5, 0.0, 0.25, 1.0]
NUM_TOKENS = 60


def statistics():
    return TokenStatistics(
        means=["mean"],
        subset_means=["part"],
        subsets=["_in"],
        maxima=["max"],
        minima=["min"],
        histograms={"histogram": torch.tensor(EDGES)},
        quantiles={"value": (torch.tensor(EDGES), [0.25, 0.99])},
    )


def random_tokens(seed, nan_fraction=0.1):
    """Values with some NaN, a mask and a subset that each pick about half; the first two tokens always count."""
    generator = np.random.default_rng(seed)
    values = (2 * generator.normal(size=NUM_TOKENS)).astype(np.float32)
    values[generator.random(NUM_TOKENS) < nan_fraction] = np.nan
    values[:2] = [0.5, -0.5]
    mask, subset = generator.random((2, NUM_TOKENS)) < 0.6
    mask[:2] = subset[:2] = True
    return values, mask, subset


NAMES = ["mean", "part", "max", "min", "histogram", "value"]


def feed(metric, values, mask, subset=None):
    """Adds the tokens of one micro-batch under a mask."""
    mask = torch.as_tensor(mask)
    values = torch.as_tensor(values)[mask]
    subset = torch.ones_like(mask) if subset is None else torch.as_tensor(subset)
    metric.update(dict.fromkeys(NAMES, values), {"_in": subset[mask]})


def bin_counts(values):
    """One value at a time: a bin holds its lower edge, and the outer bins hold what lies beyond them."""
    counts = [0] * (len(EDGES) - 1)
    for value in values:
        counts[max(0, min(len(counts) - 1, sum(value >= edge for edge in EDGES) - 1))] += 1
    return counts


def quantile(values, q):
    """Linear in the bin that holds the quantile, within the least and the largest value."""
    counts, rank = bin_counts(values), q * len(values)
    for i, count in enumerate(counts):
        if count and rank <= sum(counts[: i + 1]):
            position = EDGES[i] + (EDGES[i + 1] - EDGES[i]) * (rank - sum(counts[:i])) / count
            return min(max(position, values.min()), values.max())
    raise AssertionError


def state(metric):
    return torch.cat([metric.sums, metric.maxima]).tolist()


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, NUM_TOKENS), max_size=5))
def test_equals_float64_numpy_however_the_tokens_are_split(seed, cuts):
    values, mask, subset = random_tokens(seed)
    metric = statistics()
    for part in np.split(np.arange(NUM_TOKENS), sorted(cuts)):
        feed(metric, values[part], mask[part], subset[part])
    scalars, histograms = metric.compute()
    exact = values.astype(np.float64)
    chosen = exact[mask & ~np.isnan(exact)]
    assert scalars["mean"] == pytest.approx(chosen.mean(), rel=1e-12, abs=1e-12)
    assert scalars["part"] == pytest.approx(scalars["mean"], rel=1e-12, abs=1e-12)
    assert scalars["part_in"] == pytest.approx(exact[mask & subset & ~np.isnan(exact)].mean(), rel=1e-12, abs=1e-12)
    assert scalars["value_p25"] == pytest.approx(quantile(chosen, 0.25), rel=1e-12, abs=1e-12)
    assert scalars["value_p99"] == pytest.approx(quantile(chosen, 0.99), rel=1e-12, abs=1e-12)
    assert (scalars["min"], scalars["max"]) == (chosen.min(), chosen.max())
    histogram = histograms["histogram"]
    assert histogram.edges.tolist() == EDGES
    assert histogram.counts.tolist() == bin_counts(chosen)
    assert histogram.total == pytest.approx(chosen.sum(), rel=1e-12, abs=1e-12)
    assert histogram.total_squares == pytest.approx((chosen**2).sum(), rel=1e-12)


def test_two_micro_batches_worked_by_hand():
    metric = statistics()
    feed(metric, [1.0, 2.0, 9.0], [True, True, False], [True, False, True])
    feed(metric, [-4.0], [True], [False])
    scalars, histograms = metric.compute()
    assert scalars == {
        "mean": pytest.approx(-1 / 3),
        "part": pytest.approx(-1 / 3),
        "part_in": 1.0,
        "max": 2.0,
        "min": -4.0,
        "value_p25": pytest.approx(-2 + 0.75 * 1.5),  # rank 0.75 of the one value in [-2, -0.5)
        "value_p99": pytest.approx(0.25 + 0.985 * 0.75),  # rank 2.97 - 1 of the two in [0.25, 1]
    }
    assert histograms["histogram"].counts.tolist() == [1, 0, 0, 2]
    assert (histograms["histogram"].total, histograms["histogram"].total_squares) == (-1.0, 21.0)


def test_tokens_count_once_and_not_micro_batches():
    metric = statistics()
    feed(metric, [1.0], [True])
    feed(metric, [0.0] * 9, [True] * 9)
    assert metric.compute()[0]["mean"] == pytest.approx(0.1)


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_an_infinite_value_does_not_touch_the_subset_that_it_is_not_in(value):
    metric = statistics()
    feed(metric, [1.0, value, 3.0], [True] * 3, [True, False, True])
    scalars, _ = metric.compute()
    assert scalars["part_in"] == 2.0
    assert scalars["part"] == value


def test_nan_is_left_out_of_every_statistic():
    values, mask, subset = random_tokens(0, nan_fraction=0.3)
    assert np.isnan(values[mask]).any()
    with_nan, without = statistics(), statistics()
    feed(with_nan, values, mask, subset)
    defined = ~np.isnan(values)
    feed(without, values[defined], mask[defined], subset[defined])
    assert with_nan.compute()[0] == pytest.approx(without.compute()[0], rel=1e-12)
    assert with_nan.compute()[1]["histogram"].counts.tolist() == without.compute()[1]["histogram"].counts.tolist()


def test_infinite_values_show():
    metric = statistics()
    feed(metric, [1.0, float("inf"), -float("inf")], [True, True, True])
    scalars, histograms = metric.compute()
    assert (scalars["max"], scalars["min"]) == (float("inf"), -float("inf"))
    assert histograms["histogram"].counts.tolist() == [1, 0, 0, 2]


def test_a_value_on_an_edge_is_in_the_bin_above_and_the_last_edge_in_the_last_bin():
    metric = statistics()
    feed(metric, EDGES, [True] * 5)
    assert metric.compute()[1]["histogram"].counts.tolist() == [1, 1, 1, 2]


def test_a_name_without_tokens_is_missing():
    metric = statistics()
    feed(metric, [1.0, float("nan")], [True, True], [False, True])
    assert metric.compute()[0].keys() == {"mean", "part", "max", "min", "value_p25", "value_p99"}
    nothing = statistics()
    feed(nothing, [1.0], [False])
    scalars, histograms = nothing.compute()
    assert scalars == {}
    assert histograms["histogram"].counts.tolist() == [0, 0, 0, 0]


def test_an_empty_micro_batch_changes_nothing():
    metric = statistics()
    feed(metric, [1.0, -3.0], [True, True])
    before = state(metric)
    feed(metric, [], np.zeros(0, dtype=bool))
    assert state(metric) == before


def test_bool_values_have_a_mean():
    metric = TokenStatistics(means=["share"])
    metric.update({"share": torch.tensor([[True, False], [False, False]])})
    assert metric.compute()[0]["share"] == pytest.approx(1 / 4)


@given(st.integers(0, 2**32 - 1), st.integers(0, NUM_TOKENS))
def test_the_states_of_two_ranks_merge_to_the_state_of_one(seed, cut):
    values, mask, subset = random_tokens(seed)
    whole, first, second = statistics(), statistics(), statistics()
    feed(whole, values, mask, subset)
    feed(first, values[:cut], mask[:cut], subset[:cut])
    feed(second, values[cut:], mask[cut:], subset[cut:])
    # As torchmetrics synchronises: gathered states are stacked and reduced by the function of each state.
    for name, reduce in first._reductions.items():
        setattr(first, name, reduce(torch.stack([getattr(first, name), getattr(second, name)])))
    assert state(first) == pytest.approx(state(whole), rel=1e-12, abs=1e-12)


def test_forward_gives_the_micro_batch_and_adds_it():
    metric = statistics()
    names = ("mean", "part", "part_in", "max", "min", "value_p25", "value_p99")
    for value in (3.0, 1.0):
        values = dict.fromkeys(NAMES, torch.tensor([[value]]))
        assert metric(values, {"_in": torch.tensor([[True]])})[0] == dict.fromkeys(names, value)
    scalars, _ = metric.compute()
    assert {name: scalars[name] for name in names[:5]} == {"mean": 2, "part": 2, "part_in": 2, "max": 3, "min": 1}


def test_reset_forgets_everything():
    metric = statistics()
    feed(metric, [5.0, -5.0], [True, True])
    metric.reset()
    feed(metric, [1.0], [True])
    scalars, histograms = metric.compute()
    assert set(scalars.values()) == {1.0}
    assert histograms["histogram"].counts.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    "convert",
    [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.float()],
    ids=["to_bfloat16", "half", "float"],
)
def test_a_thousand_counts_read_a_thousand_in_whatever_precision_the_module_is(convert):
    module = nn.Linear(1, 1)
    module.statistics = statistics()
    module.statistics.reset()
    convert(module)
    assert {module.statistics.sums.dtype, module.statistics.maxima.dtype} == {torch.float64}
    for _ in range(1000):
        feed(module.statistics, [1.0], [True])
    module.statistics.reset()  # the defaults keep their precision too
    for _ in range(1000):
        feed(module.statistics, [1.0], [True])
    assert module.statistics.compute()[1]["histogram"].counts.tolist() == [0, 0, 0, 1000]


def test_low_precision_values_are_added_up_in_float64():
    metric = statistics()
    feed(metric, torch.ones(3000, dtype=torch.bfloat16), [True] * 3000)
    feed(metric, torch.full((1,), 0.5, dtype=torch.bfloat16), [True])
    assert metric.compute()[1]["histogram"].total == 3000.5


def test_more_tokens_than_float32_can_count_are_counted():
    metric = TokenStatistics(histograms={"x": torch.tensor([0.0, 1.0, 2.0])})
    metric.update({"x": torch.tensor([0.5, 1.5])})
    metric.sums[:2] = torch.tensor([2**24 + 1, 0], dtype=torch.float64)
    assert metric.compute()[1]["x"].counts.tolist() == [2**24 + 1, 0]


def test_a_histogram_of_one_bin_is_refused():
    with pytest.raises(ValueError, match="histogram of 'x' must have at least 2 bins"):
        TokenStatistics(histograms={"x": torch.tensor([0.0, 1.0])})


def test_a_name_asked_for_twice_is_refused():
    with pytest.raises(ValueError, match="'x'"):
        TokenStatistics(means=["x"], maxima=["x"])

    for value, statistic in (("x", "x_p50"), ("x/", "x/p50")):
        with pytest.raises(ValueError, match=statistic):
            TokenStatistics(means=[statistic], quantiles={value: (torch.tensor(EDGES), [0.5])})
    with pytest.raises(ValueError, match="'x_in'"):
        TokenStatistics(means=["x_in"], subset_means=["x"], subsets=["_in"])


@pytest.mark.parametrize("q", [-0.01, 1.01, float("nan")])
def test_a_quantile_out_of_range_is_refused(q):
    with pytest.raises(ValueError, match=rf"a quantile must be in \[0, 1\], got {q}"):
        TokenStatistics(quantiles={"x": (torch.tensor(EDGES), [q])})


def test_quantiles_are_named_by_their_percentage():
    metric = TokenStatistics(quantiles={"x": (torch.tensor(EDGES), [0.01, 0.1, 0.999, 1.0])})
    metric.update({"x": torch.tensor([0.5])})
    assert metric.compute()[0] == dict.fromkeys(["x_p01", "x_p10", "x_p99.9", "x_p100"], 0.5)


def test_a_quantile_is_never_beyond_the_extremes():
    metric = TokenStatistics(quantiles={"x": (torch.tensor(EDGES), [0.0, 0.5, 1.0])})
    metric.update({"x": torch.tensor([0.05, 0.1, 0.2])})
    scalars, _ = metric.compute()
    assert scalars["x_p00"] == pytest.approx(0.05)
    assert 0.05 <= scalars["x_p50"] <= 0.2
    assert scalars["x_p100"] == pytest.approx(0.2)


def test_one_kind_of_statistic_can_be_asked_for_alone():
    values = {"x": torch.tensor([1.0, 3.0])}
    for settings, expected in (
        ({"means": ["x"]}, {"x": 2.0}),
        ({"maxima": ["x"]}, {"x": 3.0}),
        ({"minima": ["x"]}, {"x": 1.0}),
        ({"subset_means": ["x"]}, {"x": 2.0}),
    ):
        metric = TokenStatistics(**settings)
        metric.update(values)
        assert metric.compute() == (expected, {})
