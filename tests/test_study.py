"""The study: a grid of real runs, its statistics and its report."""

import functools
import json
import math
import time
from pathlib import Path

import pytest

import study.run
from drpo_lightning.datamodules import ArithmeticPrompts, RolloutDataModule
from study.grid import (
    ADAPTIVE,
    HARD_SETTINGS,
    LEARNING_RATES,
    MAIN,
    OBJECTIVES,
    OTHERS,
    SETTINGS,
    Run,
    evaluation_runs,
    row_of,
    tuned_rates,
    tuning_runs,
)
from study.intervals import STUDENT_T_975, Interval, has_collapsed, mean_interval, paired_difference, verdict
from study.pool import make, read_rows
from study.report import FOLDER, fill, table, write_report
from study.run import execute

RATES = {(name, stale): 3e-5 if stale else 1e-4 for name in {**MAIN, **OTHERS} for stale in (False, True)}
TINY = [Run("main", name, "stale", 0, 1e-4, num_rollouts=2) for name in ("DRPO 0.2", "DPPO-TV")]


def synthetic_row(run):
    """A row whose final accuracy depends on the objective, the seed and the rate."""
    final = (
        0.5 + 0.01 * list(OBJECTIVES).index(run.objective) + 0.02 * (run.seed % 7) - 100 * abs(run.learning_rate - 1e-4)
    )
    figures = {
        "initial": 0.3,
        "final": final,
        "best": final,
        "area": final - 0.1,
        "curve": [0.3, final, final],
        "beyond_0.2_fraction": 0.01,
        "shift_abs_mean": 0.01,
        "corrective_fraction": 0.02,
        "mismatch_log_ratio_abs_mean": 0.03,
        "diverged": False,
        "seconds": 1.0,
        "versions": "made up",
    }
    return row_of(run, figures)


def write_rows(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def small_data(monkeypatch):
    """8 prompts a rollout instead of 64, 20 problems held out instead of 500."""
    monkeypatch.setattr(study.run, "RolloutDataModule", functools.partial(RolloutDataModule, num_prompts=8))
    monkeypatch.setattr(study.run, "ArithmeticPrompts", functools.partial(ArithmeticPrompts, num_validation=20))


def fails_for_dppo(run):
    if run.objective == "DPPO-TV":
        raise RuntimeError("no DPPO today")
    return synthetic_row(run)


def must_not_run(run):
    raise AssertionError(run.key)


@pytest.mark.filterwarnings("default")  # of the runs, which share no process with this test
def test_a_grid_is_made_once(tmp_path):
    file = tmp_path / "new" / "rows.jsonl"
    assert make(execute, TINY, file, 1, time.time() + 300)
    rows = read_rows(file)
    assert [row["key"] for row in rows] == [run.key for run in TINY]
    for row in rows:
        assert len(row["curve"]) == 2
        assert row["final"] == pytest.approx(sum(row["curve"]) / 2)
        assert row["area"] == pytest.approx(sum(row["curve"]) / 2)
        assert row["initial"] == row["curve"][0] > 0.2
        assert row["beyond_0.2_fraction"] < row["shift_abs_mean"] / 0.2
        assert row["mismatch_log_ratio_abs_mean"] < 1e-5
        assert not row["diverged"]
    before = file.read_text()
    assert make(must_not_run, TINY, file, 1, time.time() + 300)
    assert file.read_text() == before


def test_a_run_that_fails_is_reported_and_leaves_no_row(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    assert not make(fails_for_dppo, TINY, file, 1, time.time() + 300)
    assert "no DPPO today" in capsys.readouterr().err
    assert [row["objective"] for row in read_rows(file)] == ["DRPO 0.2"]


def test_nothing_starts_after_the_deadline(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert not make(must_not_run, TINY, file, 1, time.time())
    assert read_rows(file) == []


def test_a_run_that_is_repeated_counts_once(tmp_path):
    rows = [synthetic_row(TINY[0]), synthetic_row(TINY[1]), {**synthetic_row(TINY[0]), "final": 0.9}]
    read = read_rows(write_rows(tmp_path / "rows.jsonl", rows))
    assert [(row["key"], row["final"]) for row in read] == [(TINY[0].key, 0.9), (TINY[1].key, rows[1]["final"])]


def test_no_two_runs_are_equal():
    keys = [run.key for run in tuning_runs() + evaluation_runs(RATES)]
    assert len(set(keys)) == len(keys)


def test_the_tuning_seed_is_not_evaluated():
    assert not {run.seed for run in tuning_runs()} & {run.seed for run in evaluation_runs(RATES)}


def test_the_rate_with_the_largest_area_is_taken():
    runs = tuning_runs()
    areas = {run.key: 1 / (2 + i * 37 % 101) for i, run in enumerate(runs)}
    chosen = tuned_rates({**synthetic_row(run), "area": areas[run.key]} for run in runs)
    assert len(chosen) == len(MAIN) + len(OTHERS) + len(MAIN)
    for (name, stale), rate in chosen.items():
        same = [run for run in runs if run.objective == name and SETTINGS[run.setting].is_stale == stale]
        assert len(same) == len(LEARNING_RATES)
        assert rate == max(same, key=lambda run: areas[run.key]).learning_rate


def test_a_delta_takes_the_rate_of_its_regime():
    rates = {**RATES, ("DRPO 0.2", True): 1e-5, ("DRPO 12.5", True): 3e-4}
    taken = {run.objective: run.learning_rate for run in evaluation_runs(rates) if run.phase == "delta"}
    assert taken == {
        **{f"DRPO {delta:g}": 1e-5 for delta in (0.05, 0.1, 0.15, 0.5)},
        **{f"DRPO {delta:g}": 3e-4 for delta in (1.0, 2.5)},
    }


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_of_the_grid_trains(name, small_data):
    row = execute(Run("main", name, "near on-policy", 0, 1e-4, num_rollouts=1))
    assert not row["diverged"]
    assert all(math.isfinite(row[field]) for field in ("final", "area", "shift_abs_mean", "corrective_fraction"))
    assert row["shift_abs_mean"] > 0


@pytest.mark.parametrize(("freedom", "quantile"), list(enumerate(STUDENT_T_975, start=1)))
def test_quantiles_are_those_of_the_density(freedom, quantile):
    """The substitution x = sqrt(nu) tan(u) turns the density into a power of cos; Simpson's rule."""

    def integral(end, steps=2000):
        h = end / steps
        values = [math.cos(i * h) ** (freedom - 1) for i in range(steps + 1)]
        return h / 3 * (values[0] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2]) + values[-1])

    inside = integral(math.atan(quantile / math.sqrt(freedom))) / integral(math.pi / 2)
    assert inside == pytest.approx(0.95, abs=5e-6)


def test_an_interval_worked_by_hand():
    """Mean 3, sum of squares 10, s = sqrt(2.5), t = 2.776 at 4 degrees of freedom."""
    interval = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert interval.mean == 3
    assert interval.half_width == pytest.approx(2.7764 * math.sqrt(2.5 / 5))
    assert interval.count == 5


def test_a_single_value_has_no_interval():
    interval = mean_interval([0.5])
    assert interval.mean == 0.5
    assert math.isnan(interval.half_width)


@pytest.mark.parametrize("count", [0, 11])
def test_an_interval_needs_values_and_a_quantile(count):
    with pytest.raises(ValueError, match=f"`values` must be 1 to 10 numbers, got {count}"):
        mean_interval([0.5] * count)


def test_a_difference_pairs_equal_seeds_only():
    rows = [{"seed": seed, "final": value} for seed, value in ((3, 0.9), (0, 0.5), (1, 0.8))]
    reference = [{"seed": seed, "final": value} for seed, value in ((0, 0.4), (1, 0.5), (2, 0.1))]
    difference = paired_difference(rows, reference, "final")
    assert difference.mean == pytest.approx(0.2)
    assert difference.half_width == pytest.approx(12.7062 * 0.1)
    assert difference.count == 2
    assert paired_difference(rows, [], "final") is None


@pytest.mark.parametrize(
    ("mean", "half_width", "count", "words"),
    [
        (0.2, 0.1, 5, "**better**"),
        (-0.2, 0.1, 5, "**worse**"),
        (0.1, 0.1, 5, "no difference"),
        (-0.05, 0.1, 5, "no difference"),
        (0.2, math.nan, 1, "one seed"),
    ],
)
def test_a_verdict_needs_an_interval_without_zero(mean, half_width, count, words):
    assert verdict(Interval(mean, half_width, count)) == words


@pytest.mark.parametrize(
    ("initial", "final", "best", "collapsed"),
    [(0.3, 0.2, 0.3, True), (0.1, 0.4, 0.9, True), (0.1, 0.5, 0.9, False), (0.3, 0.3, 0.6, False)],
)
def test_a_collapse_ends_below_its_start_or_half_its_best(initial, final, best, collapsed):
    assert has_collapsed({"initial": initial, "final": final, "best": best}) is collapsed


@pytest.fixture
def write(tmp_path):
    """Writes a report from rows, with the template of the project."""

    def written(rows, smollm2_rows):
        files = [write_rows(tmp_path / f"{i}.jsonl", part) for i, part in enumerate((rows, smollm2_rows))]
        report = tmp_path / "docs" / "study.md"
        contents = write_report(*files, FOLDER / "study.md.in", report)
        return report, contents

    return written


def all_rows():
    tuning = [synthetic_row(run) for run in tuning_runs()]
    return tuning + [synthetic_row(run) for run in evaluation_runs(tuned_rates(tuning))]


def smollm2_rows():
    return [synthetic_row(Run("smollm2", name, "SmolLM2 fp8", 0, 1e-5, 25)) for name in list(MAIN)[:-1]]


def test_a_report_has_every_table_and_figure(write):
    rows = all_rows()
    report, contents = write(rows, smollm2_rows())
    text = report.read_text()
    assert "fill:" not in text
    assert all(part in text for part in contents.values())
    assert f"{len(rows)} of {len(rows)} runs" in contents["count"]
    lines = {name: len(part.splitlines()) - 2 for name, part in contents.items()}
    hard = len(HARD_SETTINGS)
    assert lines["tuning"] == len(tuning_runs()) / len(LEARNING_RATES)
    assert contents["tuning"].count("**") == 2 * lines["tuning"]
    assert lines["main"] == lines["main_paired"] == len(SETTINGS) * len(MAIN)
    assert lines["fast"] == lines["fast_paired"] == hard * len(MAIN)
    assert lines["others"] == lines["others_paired"] == hard * len(OTHERS)
    assert lines["delta"] == hard * 8
    assert lines["smollm2"] == len(MAIN)
    assert contents["smollm2"].count("missing") == 1
    assert all(contents["adaptive"].count(f"| {name} ") == 4 * hard for name in ADAPTIVE)
    for picture in ("tuning", "main", "curves", "fast", "delta", "smollm2"):
        assert f"(study/{picture}.png)" in text
        assert (report.parent / "study" / f"{picture}.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_says_which_runs_are_missing(write):
    tuning = [row for row in all_rows() if row["phase"] == "tuning"]
    one = [row for row in all_rows() if row["phase"] == "main" and row["setting"] == "both" and row["seed"] < 2]
    _, contents = write(tuning + one, [])
    assert contents["main"].count("| 2 of 5 |") == len(MAIN)
    assert contents["main"].count("| 0 of 5 |") == (len(SETTINGS) - 1) * len(MAIN)
    assert contents["adaptive"] == ""


def test_a_cell_holds_the_mean_and_interval_of_its_seeds(write):
    """Seeds 0 to 4 end at base + 0, 0.02, ..., 0.08: s = 0.02 sqrt(2.5)."""
    _, contents = write(all_rows(), [])
    line = next(line for line in contents["main"].splitlines() if line.startswith("| near on-policy | SPO "))
    base = 0.5 + 0.01 * list(OBJECTIVES).index("SPO")
    assert f"{base + 0.04:.3f} ± {2.7764 * 0.02 * math.sqrt(2.5 / 5):.3f}" in line
    assert f"{base - 0.06:.3f} ±" in line
    paired = next(line for line in contents["main_paired"].splitlines() if line.startswith("| near on-policy | SPO "))
    assert f"+{base - 0.5:.3f} ± 0.000 **better**" in paired


def test_a_bar_in_a_name_does_not_end_its_cell():
    lines = table(["name", "x"], [["without |A|", "1"]]).splitlines()
    assert lines[2] == r"| without \|A\| | 1 |"
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("template", ["<!-- fill: a -->", "<!-- fill: a --> <!-- fill: b --> <!-- fill: c -->"])
def test_a_template_must_have_exactly_the_markers(template):
    with pytest.raises(ValueError, match=r"markers of the template must be \['a', 'b'\], got"):
        fill(template, {"a": "1", "b": "2"})


def test_the_committed_rows_are_runs_of_the_grid():
    rows = read_rows(FOLDER / "results.jsonl")
    known = {run.key: run.phase for run in tuning_runs() + evaluation_runs(tuned_rates(rows))}
    assert {row["key"] for row in rows} <= known.keys()
    for row in rows:
        assert row["phase"] == known[row["key"]]
        assert row["key"] == Run(*(row[field] for field in Run.__dataclass_fields__)).key
        assert row["final"] == pytest.approx(sum(row["curve"][-2:]) / 2)


def test_the_committed_report_has_no_marker_left():
    text = (Path(__file__).parents[1] / "docs" / "study.md").read_text()
    assert "fill:" not in text
