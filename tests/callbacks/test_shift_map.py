"""The figure of the trust region: right places, right boundary, right legend, on every due update."""

import io
import sys

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.collections import PathCollection
from matplotlib.colors import to_rgb
from matplotlib.contour import ContourSet
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from drpo_lightning.callbacks import shift_map
from drpo_lightning.callbacks.shift_map import (
    CLASSES,
    ShiftMap,
    beyond_boundary,
    classes_of,
    figure_of,
    image_of,
    random_tokens,
    weight_colour_map,
)
from drpo_lightning.errors import SettingError
from drpo_lightning.objectives import DPPO, DRPO, GSPO, ClippedRatio, MaskDRPO, TopKDPPO, Unregularized
from tests.planted import Plant

GRID = torch.linspace(0.01, 1, 100)


def figure_with(weights, objective=DRPO(0.2), mu=0.5, pi=0.6):  # noqa: B008 - frozen
    weights = torch.as_tensor(weights)
    return figure_of(torch.full_like(weights, mu).log(), torch.full_like(weights, pi).log(), weights, objective)


def scatters_of(panel):
    return [collection for collection in panel.collections if isinstance(collection, PathCollection)]


def legend_of(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


# ---------------------------------------------------------------- the boundary


@pytest.mark.parametrize(
    ("objective", "formula"),
    [
        (DRPO(0.2), lambda mu, pi: abs(pi - mu) >= 0.2),
        (DRPO(0.995), lambda mu, pi: abs(pi - mu) >= 0.995),
        (DPPO(), lambda mu, pi: abs(pi - mu) > 0.15),
        (ClippedRatio(0.2, 0.28), lambda mu, pi: (pi / mu > 1.28) | (pi / mu < 0.8)),
        (GSPO(0.2, 0.28), lambda mu, pi: (pi / mu > 1.28) | (pi / mu < 0.8)),
        (MaskDRPO(delta=0.3, threshold=0.1), lambda mu, pi: abs(pi - mu) >= 0.3),
        (DRPO(12.5), lambda mu, pi: np.zeros_like(mu, dtype=bool)),
        (Unregularized(), lambda mu, pi: np.zeros_like(mu, dtype=bool)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_boundary_is_where_the_formula_has_it(objective, formula):
    mu, pi = np.meshgrid(GRID.double().numpy(), GRID.double().numpy(), indexing="ij")
    expected = formula(mu, pi)
    # Points on the boundary itself may round to either side.
    near = formula(mu, pi * (1 - 1e-5)) != formula(mu, pi * (1 + 1e-5))
    found = beyond_boundary(objective, GRID).numpy()
    assert (found == expected)[~near].all()
    assert near.mean() < 0.03


def test_an_objective_of_more_than_the_sampled_token_has_no_boundary_to_draw():
    assert beyond_boundary(TopKDPPO(), GRID) is None


@pytest.mark.parametrize(
    ("objective", "entry"),
    [
        (DRPO(0.2), "boundary: w ≤ 0 beyond it"),
        (ClippedRatio(), "boundary: w ≤ 0 beyond it"),
        (DRPO(12.5), "boundary cannot be reached"),
        (Unregularized(), "boundary cannot be reached"),
        (TopKDPPO(), "boundary not drawn: it depends on the top K tokens"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_legend_says_what_the_boundary_is(objective, entry):
    entries = legend_of(figure_with([1.0], objective))
    assert [text for text in entries if text.startswith("boundary")] == [entry]


def test_the_boundary_is_drawn_with_mu_to_the_right_and_pi_upwards():
    figure = figure_with([1.0], ClippedRatio(clip_low=0.2, clip_high=1.0))
    for panel in figure.axes[:2]:
        (lines,) = (c for c in panel.collections if isinstance(c, ContourSet) and not c.filled)
        mu, pi = np.concatenate([path.vertices for path in lines.get_paths()]).T
        ratio = (pi / mu)[mu > 0.2]
        assert len(ratio) > 100
        assert np.minimum(abs(ratio - 2), abs(ratio - 0.8)).max() < 0.03


# ---------------------------------------------------------------- the tokens


def test_the_legend_counts_the_tokens_of_each_kind():
    weights = [1.0] * 4 + [1.0005] + [0.5, 0.0] + [-0.1] + [2.0, torch.nan]
    entries = legend_of(figure_with(weights))
    assert {
        "kept, w = 1: 50.0%",
        "attenuated, 0 ≤ w < 1: 20.0%",
        "amplified, w > 1: 10.0%",
        "corrective, w < 0: 10.0%",
        "no gradient, A = 0: 10.0%",
    } <= set(entries)


def test_every_weight_is_in_one_class_and_none_in_no_class():
    weights = torch.cat([torch.linspace(-3, 5, 4001), torch.tensor([torch.nan])])
    counts = torch.stack(list(classes_of(weights).values())).sum(0)
    assert counts.tolist() == [1] * 4001 + [0]


@pytest.mark.parametrize("reach", [0.05, 0.9, 1.5, 4.0])
def test_kinds_of_tokens_are_told_apart_by_colour_with_any_colour_vision(reach):
    def colour(weight):
        return np.array(weight_colour_map(reach)((weight - 1 + reach) / (2 * reach))[:3])

    pairs = [(1 - 0.02 * reach - 0.002, 1.0), (1 + 0.02 * reach + 0.002, 1.0), (1 - reach / 2, 1 + reach / 2)]
    if reach > 1:
        pairs.append((-0.02, 0.02))
    # Simulation of deuteranopia, Viénot et al. 1999, in its linear approximation.
    deuteranopia = np.array([[0.625, 0.375, 0.0], [0.7, 0.3, 0.0], [0.0, 0.3, 0.7]])
    for one, other in pairs:
        for vision in (np.eye(3), deuteranopia):
            distance = np.linalg.norm(vision @ (colour(one) - colour(other)))
            assert distance > 0.15, (one, other)


def test_tokens_stand_where_mu_and_pi_are_and_rare_ones_on_the_edge():
    mu, pi = torch.tensor([0.25, 1e-9, 0.5]), torch.tensor([0.5, 0.125, 1e-12])
    figure = figure_of(mu.log(), pi.log(), torch.tensor([1.0, 0.5, -0.5]), DRPO(0.2))
    for panel in figure.axes[:2]:
        points = np.concatenate([np.asarray(scatter.get_offsets()) for scatter in scatters_of(panel)])
        assert points == pytest.approx(np.array([[0.25, 0.5], [1e-6, 0.125], [0.5, 1e-6]]))


def test_the_colour_of_a_token_is_that_of_its_weight():
    figure = figure_with([-3.0, 1.0, 5.0])
    markers = np.concatenate([scatter.get_facecolors()[:, :3] for scatter in scatters_of(figure.axes[0])])
    expected = [to_rgb(CLASSES[name].strong) for name in ("corrective", "kept", "amplified")]
    for colour in expected:
        assert abs(markers - colour).max(1).min() < 0.02


@pytest.mark.parametrize("weights", [[torch.nan, torch.nan], [1.0], [-1e6, 1e6]])
def test_extreme_updates_are_drawn_too(weights):
    image = image_of(figure_with(weights))
    assert image.dtype == np.uint8
    assert image.shape == (730, 1300, 3)
    assert 0.5 < (image > 230).mean() < 0.99


def test_axes_are_labelled():
    figure = figure_with([1.0])
    for panel, scale in zip(figure.axes[:2], ("linear", "log"), strict=True):
        assert panel.get_xscale() == panel.get_yscale() == scale
        assert "μ: probability" in panel.get_xlabel()
        assert "π: probability" in panel.get_ylabel()


def test_pyplot_is_left_alone(monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    image_of(figure_with([1.0]))
    assert "matplotlib.pyplot" not in sys.modules


def test_a_part_of_the_tokens_is_random_and_always_the_same():
    tokens = torch.arange(3000.0).view(3, 1000)
    part = random_tokens(tokens, 100, seed=4)
    assert part.shape == (3, 100)
    assert torch.equal(part, random_tokens(tokens, 100, seed=4))
    assert not torch.equal(part, random_tokens(tokens, 100, seed=5))
    assert len(part[0].unique()) == 100
    assert torch.equal(part[1], part[0] + 1000)
    assert part[0].min() < 200 < 800 < part[0].max()
    assert random_tokens(tokens, 5000, seed=4).shape == (3, 1000)


# ---------------------------------------------------------------- in a training


@pytest.mark.parametrize("accumulate", [1, 2])
def test_due_updates_are_drawn_in_tensorboard(make_run, tmp_path, accumulate):
    logger = TensorBoardLogger(tmp_path, name="run", default_hp_metric=False)
    trainer = {"logger": logger, "max_epochs": 3, "accumulate_grad_batches": accumulate}
    make_run(ShiftMap(every_n_updates=2), trainer=trainer, module={"objective": DRPO(0.2)}).fit()
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    images = events.Images("shift_map")
    assert [event.step for event in images] == [2, 4, 6]
    pixels = np.asarray(Image.open(io.BytesIO(images[-1].encoded_image_string)))
    assert pixels.shape == (730, 1300, 3)


@pytest.mark.parametrize("max_tokens", [5000, 10])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_what_is_drawn_are_the_completion_tokens_of_the_update(
    make_run, make_recorder, tmp_path, monkeypatch, accumulate, max_tokens
):
    drawn = []

    def spy(mu, pi, weight, objective, *, title):
        drawn.append((torch.stack([mu, pi, weight], 1), objective, title))
        return figure_of(mu, pi, weight, objective, title=title)

    monkeypatch.setattr(shift_map, "figure_of", spy)
    recorder = make_recorder()
    run = make_run(
        ShiftMap(every_n_updates=1, max_tokens=max_tokens),
        recorder,
        trainer={"logger": TensorBoardLogger(tmp_path), "accumulate_grad_batches": accumulate},
        module={"objective": DRPO(0.2)},
    )
    run.fit()
    _, (points, objective, title) = drawn
    expected = [
        [column[batch.completion_mask] for column in columns]
        for batch, columns in (
            (batch, (batch.rollout_logprobs, output["policy_logprobs"], output["objective"].grad_weight))
            for batch, output in zip(recorder.batches[0][accumulate:], recorder.outputs[accumulate:], strict=True)
        )
    ]
    every = {tuple(map(str, token)) for parts in expected for token in torch.stack(parts, 1).tolist()}
    num_tokens = sum(len(parts[0]) for parts in expected)
    assert len(points) == min(num_tokens, max_tokens)
    found = {tuple(map(str, token)) for token in points.tolist()}
    assert found <= every
    assert max_tokens == 10 or found == every
    assert objective == DRPO(0.2)
    assert title == f"Update 2: {len(points)} of {num_tokens} tokens"


def test_the_boundary_is_that_of_the_objective_of_the_update(make_run, make_recorder, tmp_path, monkeypatch):
    drawn, objectives = [], []
    real = shift_map.figure_of
    monkeypatch.setattr(
        shift_map,
        "figure_of",
        lambda mu, pi, w, objective, **kw: drawn.append(objective) or real(mu, pi, w, objective, **kw),
    )

    class Changes(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            objectives.append(pl_module.objective)
            pl_module.objective = DRPO(pl_module.objective.delta / 2)

    trainer = {"logger": TensorBoardLogger(tmp_path)}
    make_run(Changes(), ShiftMap(every_n_updates=1), trainer=trainer, module={"objective": DRPO(0.4)}).fit()
    assert drawn == objectives == [DRPO(0.4), DRPO(0.2)]


@pytest.mark.filterwarnings("ignore:update 2 has NaN or infinite policy_logprobs")
@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
def test_a_token_that_is_nan_is_not_drawn(make_run, tmp_path):
    trainer = {"logger": TensorBoardLogger(tmp_path), "num_sanity_val_steps": 0}
    plant = Plant("policy_logprobs", updates=[2], row=0)
    make_run(plant, ShiftMap(every_n_updates=1), module={"max_skipped_updates": 1}, trainer=trainer).fit()


def test_without_matplotlib_the_run_is_refused_with_the_way_out(make_run, make_recorder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    recorder = make_recorder()
    with pytest.raises(SettingError, match=r"pip install 'drpo-lightning\[figures\]'"):
        make_run(ShiftMap(), recorder).fit()
    assert not recorder.events


@pytest.mark.parametrize("name", ["every_n_updates", "max_tokens"])
def test_counts_are_positive(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        ShiftMap(**{name: 0})
