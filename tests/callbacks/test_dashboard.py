"""The dashboard: every chart has a scalar that a run logs, and no scalar is on two charts."""

import re

import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from drpo_lightning.callbacks import (
    CompletionLogger,
    Dashboard,
    Divergence,
    MaskStatistics,
    PolicyShift,
    RolloutStatistics,
    SyncProbe,
)
from drpo_lightning.callbacks.dashboard import LAYOUT, MASKS
from drpo_lightning.datamodules import ArithmeticPrompts
from drpo_lightning.objectives import DPPO, DRPO

# What is looked up beside the dashboard, not on it.
OFF_THE_DASHBOARD = re.compile(
    "epoch|divergence/(k1_kl|binary_tv|.*_max)|grad_weight/.*_adv|log_ratio/.*|optim/learning_rate|policy_shift/mean"
    "|region/outside_fraction_.*|reward/std|reward/.*/applies_fraction|val/completions/.*"
)


def charts_of(layout):
    """The tags of every chart, by section and title."""
    return {(section, title): tags for section, charts in layout.items() for title, (_, tags) in charts.items()}


def has(layout, section, title, tag, scalar):
    """Whether a scalar is what a chart's tag asks for: a margin names its scalars, other charts search for theirs."""
    return tag == scalar if layout[section][title][0] == "Margin" else re.search(tag, scalar) is not None


def empty_tags(layout, scalars):
    return {
        tag
        for place, tags in charts_of(layout).items()
        for tag in tags
        if not any(has(layout, *place, tag, scalar) for scalar in scalars)
    }


def read(make_run, folder, objective):
    """The events of a short run with every callback that logs."""
    logger = TensorBoardLogger(folder, default_hp_metric=False)
    callbacks = (CompletionLogger, Dashboard, Divergence, MaskStatistics, PolicyShift, RolloutStatistics, SyncProbe)
    make_run(
        *(callback() for callback in callbacks),
        trainer={"logger": logger, "max_epochs": 2, "num_sanity_val_steps": -1},
        module={"objective": objective},
        data={
            "val_prompts": ArithmeticPrompts("validation", max_operand=9, num_validation=20),
            "val_num_samples": 2,
        },
    ).fit()
    return EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "histograms": 0, "tensors": 0}).Reload()


@pytest.fixture
def events(make_run, tmp_path):
    return read(make_run, tmp_path, DRPO(0.2))


def layout_of(events):
    """The layout as TensorBoard reads it from the events."""
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {
        (category.title, chart.title): list(chart.multiline.tag)
        or [tag for series in chart.margin.series for tag in (series.value, series.lower, series.upper)]
        for category in layout.category
        for chart in category.chart
    }


def test_every_chart_has_a_scalar(events):
    assert not empty_tags(LAYOUT, events.Tags()["scalars"])
    assert empty_tags(MASKS, events.Tags()["scalars"]) == {tag for tags in charts_of(MASKS).values() for tag in tags}


def test_an_objective_with_a_mask_has_charts_of_it(make_run, tmp_path):
    events = read(make_run, tmp_path, DPPO())
    assert layout_of(events) == charts_of(LAYOUT | MASKS)
    assert not empty_tags(LAYOUT | MASKS, events.Tags()["scalars"])


def test_the_layout_is_written_as_tensorboard_reads_it(events):
    assert layout_of(events) == charts_of(LAYOUT)


def test_a_scalar_is_on_one_chart_or_known_to_be_on_none(events):
    for scalar in events.Tags()["scalars"]:
        charts = {
            place for place, tags in charts_of(LAYOUT).items() if any(has(LAYOUT, *place, tag, scalar) for tag in tags)
        }
        expected = 0 if OFF_THE_DASHBOARD.fullmatch(scalar) else 1
        assert len(charts) == expected, f"{scalar} is on {charts}"


def test_every_scalar_is_logged_once_per_step(events):
    for name in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(name)]
        assert steps == sorted(set(steps)), name
    assert [event.step for event in events.Scalars("optim/loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("reward/mean")] == [0, 2]
    assert [event.step for event in events.Scalars("val/reward/mean")] == [0, 2, 4]


def test_histograms_hold_every_token_of_the_update(events):
    names = {"histogram/probability_shift", "histogram/log_ratio", "histogram/grad_weight"}
    assert set(events.Tags()["histograms"]) == names
    tokens = [event.value for event in events.Scalars("completions/mean_length")]
    shift, ratio, weight = (
        [event.histogram_value for event in events.Histograms(name)]
        for name in ("histogram/probability_shift", "histogram/log_ratio", "histogram/grad_weight")
    )
    for rollout in (0, 1):
        updates = slice(2 * rollout, 2 * rollout + 2)
        assert sum(histogram.num for histogram in shift[updates]) == pytest.approx(16 * tokens[rollout])
        assert sum(histogram.num for histogram in ratio[updates]) == pytest.approx(16 * tokens[rollout])
        assert sum(histogram.num for histogram in weight[updates]) <= 16 * tokens[rollout]
    for histogram in shift + ratio + weight:
        assert sum(histogram.bucket) == histogram.num > 0
        assert histogram.min <= histogram.sum / histogram.num <= histogram.max


def test_the_means_of_histograms_are_the_scalars(events):
    shift = [event.value for event in events.Scalars("policy_shift/mean")]
    histograms = [event.histogram_value for event in events.Histograms("histogram/probability_shift")]
    assert [histogram.sum / histogram.num for histogram in histograms] == pytest.approx(shift, abs=1e-6)


def test_tokens_are_in_the_bins_of_their_values(events):
    for name in events.Tags()["histograms"]:
        for histogram in (event.histogram_value for event in events.Histograms(name)):
            upper = histogram.bucket_limit
            lower = [-upper[-1], *upper[:-1]]  # the ranges are symmetric
            low, high = (np.dot(edges, histogram.bucket) for edges in (lower, upper))
            assert low <= histogram.sum <= high


def test_samples_stand_in_the_text_tab(events):
    (event,) = events.Tensors("completions/text_summary")
    assert event.tensor_proto.string_val[0].decode().startswith("| prompt | completion | finish | tokens |")
