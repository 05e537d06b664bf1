"""The report: what is in the logs is on the page, and nothing else happens."""

import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard.writer import SummaryWriter

from drpo_lightning.callbacks import PolicyShift, RolloutStatistics
from drpo_lightning.charts import charts_with
from drpo_lightning.report import main
from drpo_lightning.report.page import duration, report_page
from drpo_lightning.report.runs import Curve, Run, flattened, natural, read_runs
from drpo_lightning.report.svg import MAX_POINTS, Line, line_chart, thinned, ticks


class Page(HTMLParser):
    """The page's elements and text; every element must be closed as it was opened."""

    VOID = ("meta", "link", "img", "br", "input")

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.words = [], [], []
        self.feed(html.replace("<wbr>", ""))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return "\n".join(self.words)


def make_log(folder, scalars, settings=None):
    """A run's log folder: values by tag, at the steps 0, 1, ..."""
    writer = SummaryWriter(folder)
    for tag, values in scalars.items():
        for step, value in enumerate(values):
            writer.add_scalar(tag, value, step)
    writer.close()
    if settings is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def make_page(tmp_path, *folders):
    out = tmp_path / "report.html"
    main([*map(str, folders), "--out", str(out)])
    return Page(out.read_text(encoding="utf-8"))


def charts_of(html):
    """The SVG elements of a page or chart, parsed as XML."""
    charts = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    return [chart for chart in map(ElementTree.fromstring, charts) if chart.get("role") == "img"]


def test_real_runs_are_compared(make_run, tmp_path, capsys):
    for lr in (1e-3, 2e-3):
        logger = TensorBoardLogger(tmp_path / "logs", name="run", default_hp_metric=False)
        make_run(PolicyShift(), RolloutStatistics(), trainer={"logger": logger, "max_epochs": 2}).fit()
        (tmp_path / "logs" / "run" / f"version_{logger.version}" / "config.yaml").write_text(
            yaml.safe_dump({"model": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": lr}}}})
        )
    page = make_page(tmp_path, tmp_path / "logs")
    assert capsys.readouterr().out == f"2 runs in {tmp_path / 'report.html'}\n"
    scalars = EventAccumulator(str(tmp_path / "logs" / "run" / "version_0")).Reload().Tags()["scalars"]
    for section, charts in charts_with(scalars).items():
        assert section in page.text
        assert all(title in page.text for title in charts)
    for words in ("version_0", "version_1", "model.optimizer.lr", "0.002", "1 setting in common"):
        assert words in page.text
    assert len([1 for tag, _ in page.elements if tag == "figure"]) == sum(map(len, charts_with(scalars).values()))


def test_values_on_the_page_are_those_of_the_logs(tmp_path):
    a = make_log(tmp_path / "a", {"val/pass@1": [0.25, 0.75, 0.5], "reward/mean": [0.125, 0.375]})
    make_log(tmp_path / "b", {"val/pass@1": [0.0625]})
    page = make_page(tmp_path, tmp_path)
    assert "0.75 at 1" in page.words, "the best value and its step"
    assert {"0.5", "0.375", "0.0625", "0.0625 at 0"} <= set(page.words)
    assert "a\nval/pass@1\nlast 0.5 at 2, from 0.25 to 0.75" in page.words
    assert "drpo report: 2 runs" in page.words
    assert f"drpo report: {tmp_path.name}/a" in make_page(tmp_path, a).words


def test_nothing_in_a_log_is_markup(tmp_path):
    evil = "<script>alert('&amp;')</script><b onclick=\"x\">"
    log = make_log(tmp_path / "<i>run</i>", {evil: [1.0, 2.0], "reward/<u>x</u>/mean": [1.0]}, {evil: evil, "a": 1})
    make_log(tmp_path / "other", {"reward/mean": [1.0]}, {evil: f"{evil}2", "a": 1})
    (tmp_path / "report.html").write_text("old")
    page = make_page(tmp_path, log, tmp_path / "other")
    assert not {tag for tag, _ in page.elements} & {"script", "i", "b", "u", "img"}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.words.count(evil) >= 2, "as the name of a chart, as a key and as a value"
    assert f"{evil}2" in page.words
    assert "<i>run</i>" in page.words


def test_the_page_needs_no_network_and_no_script(tmp_path):
    make_log(tmp_path / "run", {tag: [1.0, 2.0] for tag in ("reward/mean", "val/pass@1", "optim/loss")}, {"a": 1})
    make_page(tmp_path, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?:|//|\ssrc=|@import|<script|<link", html)
    assert not re.search(r"url\((?!#)", html)
    assert all(href.startswith("#") for href in re.findall(r'href="([^"]*)"', html))


def test_ids_are_unique_and_references_exist(tmp_path):
    tags = ("reward/mean", "reward/x/mean", "optim/loss")
    for name in ("a", "b"):
        make_log(tmp_path / name, {tag: [1.0, 2.0] for tag in tags})
    page = make_page(tmp_path, tmp_path)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 0
    used = [attributes["href"].removeprefix("#") for tag, attributes in page.elements if tag == "use"]
    assert len(used) == 6
    assert set(used) <= set(ids)


def test_settings_are_split_into_differing_and_common_ones(tmp_path):
    objective = {"class_path": "drpo_lightning.objectives.DRPO", "init_args": {"delta": 0.2}}
    callbacks = [{"class_path": "a.Shift"}, {"class_path": "a.Reward", "init_args": {"weight": 1}}]
    common = {"seed": 0, "trainer": {"callbacks": callbacks}}
    make_log(tmp_path / "a", {"reward/mean": [1.0]}, common | {"model": {"objective": objective}})
    other = {"class_path": "drpo_lightning.objectives.DPPO", "init_args": {"threshold": None}}
    with_one_more = {"callbacks": [{"class_path": "a.New"}, *callbacks]}
    make_log(tmp_path / "b", {"reward/mean": [1.0]}, common | {"model": {"objective": other}, "trainer": with_one_more})
    make_log(tmp_path / "c", {"reward/mean": [1.0]}, common | {"model": {"objective": objective}})
    page = make_page(tmp_path, tmp_path)
    differing, folded = page.text.split("settings in common")
    for key in ("model.objective", "model.objective.delta", "model.objective.threshold", "trainer.callbacks.New"):
        assert f"\n{key}\n" in differing
        assert f"\n{key}\n" not in folded
    for key in ("seed", "trainer.callbacks.Shift", "trainer.callbacks.Reward.weight"):
        assert f"\n{key}\n" in folded
        assert f"\n{key}\n" not in differing


def test_settings_are_flattened_to_the_keys_of_the_command_line():
    settings = {
        "seed": 0,
        "model": {"objective": {"class_path": "drpo_lightning.objectives.DRPO", "init_args": {"delta": 0.2}}},
        "logger": {"class_path": "x.Y"},
        "betas": [0.9, 0.99],
        "none": None,
        "text": "a: ${b",
        "empty": {},
        "callbacks": [
            {"class_path": "p.Reward", "init_args": {"weight": 1}},
            {"class_path": "q.Reward", "init_args": {"weight": 2}},
            {"plain": True},
        ],
    }
    assert dict(flattened(settings)) == {
        "seed": "0",
        "model.objective": "objectives.DRPO",
        "model.objective.delta": "0.2",
        "logger": "x.Y",
        "betas": "[0.9, 0.99]",
        "none": "null",
        "text": "a: ${b",
        "callbacks.Reward": "p.Reward",
        "callbacks.Reward.weight": "1",
        "callbacks.Reward2": "q.Reward",
        "callbacks.Reward2.weight": "2",
        "callbacks.1.plain": "true",
    }


def test_scalars_on_no_chart_have_one_each(tmp_path):
    make_log(tmp_path / "run", {"reward/mean": [1.0], "my/own (value)": [3.0, 4.0], "best/val/pass@1": [1.0]})
    page = make_page(tmp_path, tmp_path / "run")
    assert "Other" in page.words
    assert "my/own (value)" in page.words
    assert "best/val/pass@1" not in page.text


def test_runs_are_found_at_any_depth_once_and_in_their_natural_order(tmp_path):
    for version in (10, 2, 1):
        make_log(tmp_path / "logs" / "x" / f"version_{version}", {"reward/mean": [1.0]})
    make_log(tmp_path / "logs", {"reward/mean": [1.0]})
    runs = read_runs([str(tmp_path), str(tmp_path / "logs" / "x"), str(tmp_path / "logs" / ".." / "logs")])
    assert [run.name for run in runs] == ["logs", *(f"logs/x/version_{version}" for version in (1, 2, 10))]
    assert natural("beyond_0.05") < natural("beyond_0.1")


def test_a_resumed_run_is_one_curve(tmp_path):
    for steps, value in (((0, 1, 2), 1.0), ((1, 2, 3), 2.0)):
        writer = SummaryWriter(tmp_path / "run", filename_suffix=str(value))
        for step in steps:
            writer.add_scalar("reward/mean", value, step, walltime=1e9 + 10 * value + step)
        writer.close()
    (run,) = read_runs([str(tmp_path)])
    assert run.curves["reward/mean"] == Curve([0, 1, 2, 3], [1.0, 2.0, 2.0, 2.0])
    assert run.seconds == 13


def test_a_run_without_scalars_is_listed(tmp_path):
    writer = SummaryWriter(tmp_path / "run")
    writer.add_text("note", "nothing yet")
    writer.close()
    page = make_page(tmp_path, tmp_path)
    assert f"{tmp_path.name}/run" in page.text
    assert "figure" not in {tag for tag, _ in page.elements}


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "the log folder '{folder}' does not exist"),
        (lambda folder: folder.mkdir(), "no run in '{folder}': neither it nor a folder below it has a file"),
        (lambda folder: folder.touch(), "the log folder '{folder}' does not exist"),
        (lambda folder: make_log(folder, {"a": [1]}, {}) / "config.yaml", "the settings in '{folder}/config.yaml'"),
    ],
    ids=["missing", "empty", "a file", "broken settings"],
)
def test_what_is_no_log_is_an_error_of_one_line(tmp_path, capsys, prepare, message):
    folder = tmp_path / "logs"
    settings = prepare(folder)
    if settings:
        settings.write_text("a: [1\nb: }")
    with pytest.raises(SystemExit) as ended:
        main([str(folder), "--out", str(tmp_path / "report.html")])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith(f"drpo: error: {message.format(folder=folder)}")
    assert error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("out", ["missing/report.html", "."])
def test_a_page_that_cannot_be_written_is_an_error_of_one_line(tmp_path, capsys, out):
    make_log(tmp_path / "run", {"reward/mean": [1.0]})
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), "--out", str(tmp_path / out)])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith(f"drpo: error: the report cannot be written to '{tmp_path / out}': ")
    assert error.count("\n") == 1


def test_a_broken_event_file_ends_where_it_is_broken(tmp_path):
    log = make_log(tmp_path / "run", {"reward/mean": [1.0, 2.0, 3.0]})
    (file,) = log.glob("events*")
    file.write_bytes(file.read_bytes()[:-5])
    (run,) = read_runs([str(tmp_path)])
    assert run.curves["reward/mean"] == Curve([0, 1], [1.0, 2.0])


def test_the_command_starts_without_torch(tmp_path):
    make_log(tmp_path / "run", {"reward/mean": [1.0]})
    code = "import sys; from drpo_lightning.report import main; main(sys.argv[1:]); print(sorted(sys.modules))"
    command = [sys.executable, "-c", code, str(tmp_path), "--out", str(tmp_path / "report.html")]
    modules = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "'drpo_lightning.charts'" in modules
    assert not re.search(r"'(torch|lightning|transformers)'", modules)


# -------------------------------------------------------------------- charts


def line(values, **changes):
    return Line(Curve(list(range(len(values))), list(values)), "label", "red")._replace(**changes)


def paths_of(chart, kind="line"):
    return [path.get("d") for path in chart.iter("path") if path.get("class") == kind]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_leave_a_gap_and_are_counted(tmp_path, bad):
    (chart,) = charts_of(line_chart([line([1.0, 2.0, bad, 3.0, 4.0])], "c"))
    (path,) = paths_of(chart)
    assert path.count("M") == 2
    assert not re.search("nan|inf", ElementTree.tostring(chart, encoding="unicode"))
    run = Run("run", {}, {"optim/loss": Curve([0, 1, 2], [1.0, bad, bad])}, 1.0)
    assert "2 values are NaN or infinite" in report_page([run])
    assert "1 value is NaN or infinite" in report_page([run._replace(curves={"a": Curve([0], [bad])})])


def test_a_curve_without_a_finite_value_says_so():
    assert "no finite value" in line_chart([line([math.nan, math.inf])], "c")
    page = Page(report_page([Run("run", {}, {"val/pass@1": Curve([0], [math.nan])}, 1.0)]))
    assert "nan" in page.words, "the last value"


def test_a_single_point_is_a_dot():
    (chart,) = charts_of(line_chart([line([5.0])], "c"))
    (dot,) = chart.iter("circle")
    assert 0 < float(dot.get("cx")) < 360
    assert 0 < float(dot.get("cy")) < 210


def test_points_are_drawn_where_the_axes_say():
    (chart,) = charts_of(line_chart([line([10.0, 15.0, 20.0])], "c"))
    labels = {element.text: element for element in chart.iter("text")}
    points = [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)", paths_of(chart)[0])]
    assert [float(labels[step].get("x")) for step in ("0", "1", "2")] == pytest.approx([x for x, _ in points])
    assert [float(labels[value].get("y")) for value in ("10", "20")] == pytest.approx([points[0][1], points[2][1]])
    assert points[2][1] < points[0][1], "up is more"


def test_a_thousand_points_are_thinned_to_means_and_ranges():
    values = [math.sin(i / 50) + (1.0 if i == 500 else 0.0) for i in range(1000)]
    points = thinned(Curve(list(range(1000)), values))
    assert len(points) == MAX_POINTS
    for i, point in enumerate(points):
        group = values[10 * i : 10 * i + 10]
        assert point.step == 10 * i + 4.5
        assert point.mean == pytest.approx(sum(group) / 10)
        assert (point.low, point.high) == (min(group), max(group))
    (chart,) = charts_of(line_chart([line(values)], "c"))
    assert len(paths_of(chart, "band")) == 1
    assert len(line_chart([line(values)], "c")) < 8000
    (short,) = charts_of(line_chart([line(values[:MAX_POINTS])], "c"))
    assert paths_of(short, "band") == []


def test_a_group_with_some_finite_values_is_their_mean():
    points = thinned(Curve([0, 1, 2, 3], [1.0, math.nan, math.inf, math.nan]), max_points=2)
    assert points[0][1:] == (1.0, 1.0, 1.0)
    assert math.isnan(points[1].mean)


@pytest.mark.parametrize("values", [[3.0] * 3, [0.0] * 3, [-2.0] * 3, [3.4e38, -3.4e38], [1e-30, 2e-30]])
def test_extreme_and_equal_values_stay_inside(values):
    (chart,) = charts_of(line_chart([line(values)], "c"))
    for x, y in re.findall(r"([-\d.]+) ([-\d.]+)", paths_of(chart)[0]):
        assert 40 <= float(x) <= 360
        assert 0 <= float(y) <= 210


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (-0.01, 0.09, [0, 0.02, 0.04, 0.06, 0.08]),
        (0, 640, [0, 200, 400, 600]),
        (1e-9, 6e-9, [1e-9, 2e-9, 3e-9, 4e-9, 5e-9, 6e-9]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_every_run_has_a_colour_of_its_own_and_every_scalar_a_pattern():
    runs = [Run(f"run {i}", {}, {f"val/pass@{k}": Curve([0, 1], [0, 1]) for k in (1, 2)}, 1.0) for i in range(12)]
    page = Page(report_page(runs))
    swatches = [values["style"] for _, values in page.elements if values.get("class") == "swatch"]
    assert len(set(swatches)) == 12
    lines = [values.get("stroke-dasharray") for _, values in page.elements if values.get("class") == "line"]
    assert lines.count(None) == 12
    assert len(set(lines)) == 2


def test_durations_are_in_hours_minutes_and_seconds():
    assert [duration(seconds) for seconds in (0, 59.6, 3599, 90061)] == ["0:00:00", "0:01:00", "0:59:59", "25:01:01"]
