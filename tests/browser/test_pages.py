"""TensorBoard and the report as a user sees them, in a headless browser on the logs of two real runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from drpo_lightning.charts import charts_with
from drpo_lightning.report.command import write_report

pytest.importorskip("selenium")
from scripts.screenshot import DRIVER, SHOWN_TAGS, TABS, chromium, open_page, save_picture, set_view, tensorboard

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not Path(DRIVER).exists(), reason="needs chromium-driver"),
]

ROOT = Path(__file__).parents[2]
CALLBACKS = (
    "rewards.ExactMatchReward",
    "policy_shift.PolicyShift",
    "divergence.Divergence",
    "mask_statistics.MaskStatistics",
    "mismatch_and_drift.MismatchAndDrift",
    "rollout_statistics.RolloutStatistics",
    "completion_logger.CompletionLogger",
    "token_table.TokenTable",
    "shift_map.ShiftMap",
    "sync_probe.SyncProbe",
    "dashboard.Dashboard",
    "hyperparameters.HyperparameterLogger",
)
OBJECTIVES = ("DRPO", "DPPO")
SHOWN_TABS = {tab.name: tab for tab in TABS}


@pytest.fixture(scope="module")
def logdir(tmp_path_factory):
    """The logs of 20 rollouts by each of two objectives."""
    folder = tmp_path_factory.mktemp("logs")
    callbacks = ", ".join(f"{{class_path: drpo_lightning.callbacks.{name}}}" for name in CALLBACKS)
    for objective in OBJECTIVES:
        command = [sys.executable, "-m", "drpo_lightning", "fit", "--config=configs/quickstart.yaml"]
        command += [f"--trainer.callbacks=[{callbacks}]", f"--model.objective={objective}"]
        command += ["--data.engine=drpo_lightning.rollout.TransformersEngine", f"--trainer.default_root_dir={folder}"]
        command += ["--trainer.max_epochs=20", "--trainer.check_val_every_n_epoch=5", "--trainer.accelerator=cpu"]
        command += [f"--trainer.logger.init_args.save_dir={folder}", f"--trainer.logger.init_args.name={objective}"]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def tags(logdir):
    """The tags of the DPPO run by kind: it has a mask, and so all charts that the other has."""
    return EventAccumulator(str(logdir / "DPPO" / "version_0")).Reload().Tags()


@pytest.fixture(scope="module")
def url(logdir):
    with tensorboard(logdir) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Where pictures are kept: in `$DRPO_PICTURES` if it is set."""
    folder = os.environ.get("DRPO_PICTURES")
    return ROOT / folder if folder else tmp_path_factory.mktemp("pictures")


def expected_words(tab, tags):
    """What stands on a tab of the two runs."""
    texts = [tag for tag in tags["tensors"] if tag.endswith("/text_summary")]
    layout = charts_with(tags["scalars"])
    return {
        "custom_scalars": [*layout, *(title for charts in list(layout.values())[:3] for title in charts)],
        "timeseries": ["\n/".join(tag.rsplit("/", 1)) for tag in SHOWN_TAGS],
        "scalars": SHOWN_TAGS,
        "histograms": tags["histograms"],
        "images": tags["images"],
        "text": [*texts, "prompt", "completion", "exact_match"],
        "hparams": ["objective", "learning_rate", "DRPO(delta=0.2", "DPPO(", "best held-out pass@1", "held-out reward"],
    }[tab]


@pytest.mark.parametrize("tab", SHOWN_TABS)
def test_a_tab_shows_its_charts(tab, browser, url, tags, pictures):
    size = SHOWN_TABS[tab]
    set_view(browser, size.width, size.height)
    expected = expected_words(tab, tags)
    assert expected, f"nothing was logged for {tab}"
    words = open_page(browser, url + size.address, expected)
    save_picture(browser, pictures / size.file)
    assert not [word for word in expected if word not in words]


def test_no_chart_of_the_dashboard_is_empty(browser, url):
    set_view(browser, 1500, 3000)
    words = open_page(browser, f"{url}/#custom_scalars", ["Matches (2)"], unwanted=["Matches (0)"])
    matches = re.findall(r"Matches \((\d+)\)", words)
    assert len(matches) > 20
    assert "0" not in matches


@pytest.fixture(scope="module")
def report(logdir, tmp_path_factory):
    file = tmp_path_factory.mktemp("report") / "report.html"
    write_report([str(logdir)], str(file))
    return file.as_uri()


def test_the_report_shows_both_runs_and_their_charts(browser, report, tags, pictures):
    set_view(browser, 1500, 2300)
    titles = [title for charts in charts_with(tags["scalars"]).values() for title in charts]
    expected = ["DRPO/version_0", "DPPO/version_0", "Settings that differ", "model.\nobjective.\ndelta", *titles]
    browser.get_log("browser")  # of the pages before
    words = open_page(browser, report, expected)
    save_picture(browser, pictures / "report.png")
    assert not [word for word in expected if word not in words]
    assert len(browser.find_elements("css selector", "svg path.line")) > len(titles)
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("is_dark", [False, True])
def test_the_report_is_readable_on_a_phone(browser, report, pictures, is_dark):
    set_view(browser, 390, 1500, is_dark=is_dark)
    open_page(browser, report, ["Reward"])
    save_picture(browser, pictures / f"report-phone{'-dark' if is_dark else ''}.png")
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390, "nothing sticks out"
    back, text = browser.execute_script(
        "const style = getComputedStyle(document.body);"
        "return [style.backgroundColor, style.color].map(colour => Math.max(...colour.match(/\\d+/g)))"
    )
    assert (text - back > 150) if is_dark else (back - text > 150)
