"""The benchmark of growth runs, shows what is computed, and computes the same packed and padded."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from drpo_lightning.modules import packed_attention

ROOT = Path(__file__).parents[1]
TINY = ["--hidden=64", "--layers=1", "--tokens=128", "--prompts=4", "--points=2", "--repeats=1", "--micro-batches=2"]
WINDOW = 3


@pytest.fixture
def growth(monkeypatch):
    """The benchmark, whose points are measured in this process."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("growth")
    yield module
    del sys.modules["growth"]


@pytest.fixture
def run(growth, monkeypatch, capsys):
    """Measures in this process; gives the cells of the table."""
    monkeypatch.setattr(growth, "cost_in_a_process_of_its_own", growth.cost)

    def call(*arguments):
        growth.main([*TINY, *arguments])
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[3:]]

    return call


def test_every_quantity_is_doubled_and_computes_the_same_packed_and_padded(growth, run):
    lines = run()
    assert [line[0] for line in lines] == [name for name in growth.QUANTITIES for _ in range(2)]
    assert [line[1] for line in lines] == ["1", "2"] * len(growth.QUANTITIES)
    tokens, padded = ([int(line[place]) for line in lines] for place in (2, 3))
    assert all(more >= least for more, least in zip(padded, tokens, strict=True))
    assert all(float(seconds) > 0 for line in lines for seconds in line[4:7])
    of = dict(zip(growth.QUANTITIES, zip(tokens[::2], tokens[1::2], strict=True), strict=True))
    assert of["tokens"][1] - of["tokens"][0] == pytest.approx(128, abs=8)
    assert of["longest"][1] == pytest.approx(of["longest"][0], rel=0.1)
    assert of["sequences"][1] - of["sequences"][0] == pytest.approx(4 * 4 * 16, abs=8)  # prompts: completions stay
    assert of["group_size"][1] == pytest.approx(2 * of["group_size"][0], rel=0.05)
    assert of["vocabulary"][1] == of["vocabulary"][0]


def test_a_longer_completion_costs_padding_only(run):
    (tokens, padded), (more_tokens, more_padded) = (map(float, line[2:4]) for line in run("--quantities", "longest"))
    assert abs(more_tokens - tokens) < 0.1 * tokens
    assert more_padded > 1.2 * padded > 1.2 * tokens


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_stops_if_packed_is_not_padded(run, monkeypatch, precision):
    real = packed_attention._window_mask
    monkeypatch.setattr(packed_attention, "_window_mask", lambda length, _, device: real(length, WINDOW, device))
    with pytest.raises(ValueError, match=r"the (loss|gradient_norm) is \S+ packed and \S+ padded"):
        run("--quantities", "tokens", "--precision", precision)


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
def test_a_difference_is_held_against_the_gradients_norm(growth, name):
    cost = growth.Cost(1, 1, 1.0, 1, loss=0.5, gradient_norm=2.0)
    growth.check_equal(replace(cost, **{name: getattr(cost, name) + 0.019}), cost, 0.01)
    for wrong in (getattr(cost, name) + 0.021, float("nan")):
        with pytest.raises(ValueError, match=f"the {name} is"):
            growth.check_equal(replace(cost, **{name: wrong}), cost, 0.01)


@pytest.mark.reliability
def test_points_are_measured_in_processes_of_their_own_and_drawn(growth, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    growth.main([*TINY, "--quantities", "vocabulary", "--plot", str(tmp_path / "growth.png")])
    peaks = [[float(cell) for cell in line.split("|")[8:10]] for line in capsys.readouterr().out.splitlines()[3:]]
    assert len(peaks) == 2
    assert (tmp_path / "growth.png").stat().st_size > 1000
