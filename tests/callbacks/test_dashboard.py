"""The dashboard: every chart has a scalar that a run logs, and no scalar is on two charts."""

import re

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
from drpo_lightning.callbacks.dashboard import LAYOUT
from drpo_lightning.datamodules import ArithmeticPrompts
from drpo_lightning.objectives import DPPO, DRPO

CHARTS = {(section, chart): tags for section, charts in LAYOUT.items() for chart, (_, tags) in charts.items()}
PATTERNS = {
    (*place, tag if LAYOUT[place[0]][place[1]][0] == "Multiline" else f"^{re.escape(tag)}$")
    for place, tags in CHARTS.items()
    for tag in tags
}
# Scalars that are looked up beside the dashboard, not on it.
OFF_THE_DASHBOARD = {
    "epoch",
    "optim/learning_rate",
    "policy_shift/mean",
    "reward/std",
    "reward/scattered/applies_fraction",
    "importance_ratio/mean",
    "importance_ratio/max",
    "val/completions/mean_length",
    "val/completions/truncated_fraction",
}
OFF_THE_DASHBOARD_START = ("log_ratio/", "grad_weight/attenuated_fraction_", "grad_weight/amplified_fraction_")


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


def test_every_chart_but_that_of_masks_has_a_scalar(events):
    scalars = events.Tags()["scalars"]
    empty = {place for place in PATTERNS if not any(re.search(place[-1], name) for name in scalars)}
    assert empty == {place for place in PATTERNS if "mask" in place[-1]}


def test_with_a_mask_every_chart_has_a_scalar(make_run, tmp_path):
    scalars = read(make_run, tmp_path, DPPO()).Tags()["scalars"]
    assert all(any(re.search(pattern, name) for name in scalars) for *_, pattern in PATTERNS)


def test_a_scalar_is_on_one_chart_or_known_to_be_on_none(events):
    for name in events.Tags()["scalars"]:
        charts = {place[:2] for place in PATTERNS if re.search(place[-1], name)}
        is_off = name in OFF_THE_DASHBOARD or name.startswith(("divergence/",) if name.endswith("_max") else ())
        is_off = is_off or name.startswith(OFF_THE_DASHBOARD_START)
        assert len(charts) == (0 if is_off else 1), f"{name} is on {charts}"


def test_the_layout_is_written_as_tensorboard_reads_it(events):
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    read = {
        (category.title, chart.title): list(chart.multiline.tag)
        or [tag for series in chart.margin.series for tag in (series.value, series.lower, series.upper)]
        for category in layout.category
        for chart in category.chart
    }
    assert read == CHARTS


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


def test_samples_stand_in_the_text_tab(events):
    (event,) = events.Tensors("completions/text_summary")
    assert event.tensor_proto.string_val[0].decode().startswith("| prompt | completion | finish | tokens |")
