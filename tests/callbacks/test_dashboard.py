"""The dashboard: every chart has a scalar that a run logs, and no scalar is on two charts."""

import json
import re
from urllib.parse import urlencode
from urllib.request import urlopen

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
from drpo_lightning.callbacks.adaptive_delta import AdaptiveDelta
from drpo_lightning.callbacks.mismatch_and_drift import MismatchAndDrift
from drpo_lightning.charts import FIGURES, LAYOUT, charts_with
from drpo_lightning.datamodules import ArithmeticPrompts
from drpo_lightning.objectives import DPPO, DRPO
from scripts.screenshot import tensorboard

CALLBACKS = (
    CompletionLogger,
    Dashboard,
    Divergence,
    MaskStatistics,
    MismatchAndDrift,
    PolicyShift,
    RolloutStatistics,
    SyncProbe,
)
ELSEWHERE = [
    *("val/pass@16", "rollout/number", "guardrail/triggered", "adaptive/corrective_fraction"),
    *(f"proxy/{name}_{kind}" for name in ("binary", "topk", "exact") for kind in ("tv", "kl")),
    *(f"entropy/{name}" for name in ("mean", "mean_first_quarter", "mean_last_quarter", "p50", "p90", "p99", "max")),
    *(f"reference/{name}" for name in ("k1_kl", "k3_kl", "log_ratio_abs_mean", "log_ratio_abs_max")),
    *(
        "reference/beyond_clamp_fraction",
        "optim/reference_penalty",
        "perf/mfu",
        "engine/restarts",
        "engine/servers",
        "engine/retried_requests",
    ),
    *(f"{kind}reward/judge/{what}_fraction" for kind in ("", "val/") for what in ("error", "timeout")),
    *("data/passes", "data/skipped_fraction", "data/overlong_prompts", "data/gsm8k/reward_mean", "data/gsm8k/fraction"),
    *("reward/dropped_fraction", "val/maj@4", "val/aime/maj@4", "val/aime/reward/mean"),
    "dynamic_sampling/rounds",
    "dynamic_sampling/discarded_fraction",
    "dynamic_sampling/discarded_tokens",
    "dynamic_sampling/seconds",
    "dynamic_sampling/reward_mean",
]
"""Scalars that other runs log than the ones of these tests."""


def log(make_run, folder, objective, *callbacks):
    """A short run with every callback that logs; gives its log folder."""
    logger = TensorBoardLogger(folder, name="", version=type(objective).__name__, default_hp_metric=False)
    make_run(
        *(callback() for callback in CALLBACKS),
        *callbacks,
        trainer={"logger": logger, "max_epochs": 2, "num_sanity_val_steps": -1},
        module={"objective": objective},
        data={
            "val_prompts": ArithmeticPrompts("validation", max_operand=9, num_validation=20),
            "val_num_samples": 2,
        },
    ).fit()
    return logger.log_dir


def read(folder):
    return EventAccumulator(folder, size_guidance={"scalars": 0, "histograms": 0, "tensors": 0}).Reload()


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Runs by objective, each made once for all tests."""
    return tmp_path_factory.mktemp("logs"), {}


@pytest.fixture
def logdir(logs, make_run):
    """The logs of a DRPO run and of a DPPO run, which has a mask."""
    folder, runs = logs
    if not runs:
        runs["DRPO"] = log(make_run, folder, DRPO(0.2), AdaptiveDelta())
        runs["DPPO"] = log(make_run, folder, DPPO())
    return folder


@pytest.fixture
def events(logdir):
    return read(str(logdir / "DRPO"))


@pytest.fixture
def masked(logdir):
    return read(str(logdir / "DPPO"))


def layout_of(events):
    """The patterns of the layout as TensorBoard reads it from the events."""
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    return {
        category.title: {chart.title: list(chart.multiline.tag) for chart in category.chart}
        for category in layout.category
    }


def patterns():
    return [(title, pattern) for charts in LAYOUT.values() for title, pattern in charts.items()]


def titles_of(scalar):
    return [title for title, pattern in patterns() if re.fullmatch(pattern, scalar)]


def test_every_chart_has_a_scalar(events, masked):
    scalars = events.Tags()["scalars"] + masked.Tags()["scalars"] + ELSEWHERE
    assert [title for title, pattern in patterns() if not any(re.fullmatch(pattern, tag) for tag in scalars)] == []


def test_every_scalar_is_on_one_chart(events, masked):
    for scalar in {*events.Tags()["scalars"], *masked.Tags()["scalars"], *ELSEWHERE}:
        assert len(titles_of(scalar)) == 1, f"{scalar} is on {titles_of(scalar)}"


def test_a_page_of_tensorboard_holds_every_section():
    assert max(map(len, LAYOUT.values())) <= 12


def test_main_figures_are_scalars_on_charts():
    assert all(titles_of(tag) for tag in FIGURES)


def test_charts_without_a_scalar_are_left_out():
    assert charts_with([]) == {}
    assert charts_with(["val/pass@4", "val/pass@4/x", "xoptim/loss"]) == {
        "Reward": {title: LAYOUT["Reward"][title] for title in ("held-out avg@k, pass@k and maj@k",)}
    }


def test_the_dashboard_has_the_charts_that_the_run_has_scalars_for(events, masked):
    for run in (events, masked):
        assert layout_of(run) == {
            section: {title: [f"^(?:{pattern})$"] for title, pattern in charts.items()}
            for section, charts in charts_with(run.Tags()["scalars"]).items()
        }
    assert "Masks" in layout_of(masked)
    assert "Masks" not in layout_of(events)


def test_the_charts_of_an_update_are_there_before_the_next_one(make_run, make_recorder, tmp_path):
    seen = []

    def look(trainer, pl_module, batch_idx):
        if trainer.global_step == 2:
            trainer.logger.experiment.flush()
            seen.append(layout_of(read(trainer.log_dir)))

    logger = TensorBoardLogger(tmp_path, default_hp_metric=False)
    make_run(PolicyShift(), RolloutStatistics(), make_recorder(look), Dashboard(), trainer={"logger": logger}).fit()
    assert "mean |pi - mu|" in seen[0]["Trust region"]
    assert "mean reward" in seen[0]["Reward"]
    assert "sampled tokens per second" not in seen[0]["Speed"], "known at the end of the rollout"
    assert "sampled tokens per second" in layout_of(read(logger.log_dir))["Speed"]


def answer(url, path, **arguments):
    """What TensorBoard's HTTP API says."""
    with urlopen(f"{url}/data/{path}?{urlencode(arguments)}", timeout=30) as response:
        return json.load(response)


def test_tensorboard_serves_every_chart_with_points(logdir):
    with tensorboard(logdir) as url:
        runs = answer(url, "runs")
        layout = answer(url, "plugin/custom_scalars/layout")
        charts = [(category["title"], chart) for category in layout["category"] for chart in category["chart"]]
        assert sorted(runs) == ["DPPO", "DRPO"]
        assert len(charts) > 40
        for section, chart in charts:
            (tag,) = chart["multiline"]["tag"]
            found = [answer(url, "plugin/custom_scalars/scalars", run=run, tag=tag)["tag_to_events"] for run in runs]
            points = [point for curves in found for curve in curves.values() for point in curve]
            assert points, f"{section}: {chart['title']}"
            assert LAYOUT[section][chart["title"]] in tag


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
