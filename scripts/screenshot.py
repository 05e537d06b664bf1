"""Takes pictures of runs in a headless browser: the tabs of TensorBoard, and the report.

Needs the packages `chromium` and `chromium-driver` of Debian, and `selenium` from PyPI.

    python scripts/screenshot.py runs/quickstart docs
"""

import argparse
import contextlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from drpo_lightning.report.command import write_report

if TYPE_CHECKING:
    from selenium import webdriver

DRIVER = "/usr/bin/chromedriver"
SHOWN_TAGS = (
    "reward/mean",
    "val/pass@1",
    "policy_shift/abs_mean",
    "grad_weight/corrective_fraction",
    "completions/mean_length",
    "perf/tokens_per_second",
)
"""Scalars on the pictures of the tabs that have all of them."""


class Tab(NamedTuple):
    """A tab of TensorBoard and the size of its picture, in pixels."""

    name: str
    file: str
    width: int = 1500
    height: int = 900

    @property
    def address(self) -> str:
        """Where it is on a TensorBoard; with a filter of tags, if it shows all scalars."""
        tags = urllib.parse.quote(f"^({'|'.join(SHOWN_TAGS)})$", safe="")
        filtered = {"timeseries": f"/?tagFilter={tags}#timeseries", "scalars": f"/#scalars&tagFilter={tags}"}
        return filtered.get(self.name, f"/#{self.name}")


TABS = (
    Tab("custom_scalars", "dashboard.png", height=2300),
    Tab("timeseries", "dashboard-timeseries.png", height=1340),
    Tab("scalars", "dashboard-scalars.png"),
    Tab("histograms", "dashboard-histograms.png"),
    Tab("images", "dashboard-images.png", height=560),
    Tab("text", "dashboard-text.png"),
    Tab("hparams", "dashboard-hparams.png", width=2300, height=700),
)
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
WORDS = """
const words = [];
const walk = node => {
  if (node.nodeType === Node.TEXT_NODE) { words.push(node.textContent.trim()); return; }
  if (['SCRIPT', 'NOSCRIPT', 'STYLE', 'TEMPLATE'].includes(node.nodeName)) return;
  if (node.nodeType === Node.ELEMENT_NODE && getComputedStyle(node).display === 'none') return;
  if (node.shadowRoot) walk(node.shadowRoot);
  node.childNodes.forEach(walk);
};
walk(document.body);
return words.filter(word => word).join('\\n');
"""
"""What a page shows as text, inside of web components too."""


@contextlib.contextmanager
def tensorboard(logdir: Path, timeout_seconds: float = 60.0) -> Iterator[str]:
    """Serves logs as long as the context lasts; gives the address once TensorBoard has found a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    # From inside of the folder, whose path would else be on the pictures.
    command = [sys.executable, "-m", "tensorboard.main", "--logdir=.", f"--port={port}", "--host=127.0.0.1"]
    server = subprocess.Popen(command, cwd=logdir, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + timeout_seconds
        while not has_runs(url):
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"TensorBoard does not serve {logdir}")
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=30)


def has_runs(url: str) -> bool:
    """Whether a TensorBoard answers and has read at least one run."""
    try:
        with urllib.request.urlopen(f"{url}/data/runs", timeout=5) as answer:
            return bool(answer.read().strip() != b"[]")
    except (urllib.error.URLError, OSError):
        return False


@contextlib.contextmanager
def chromium() -> Iterator["webdriver.Chrome"]:
    """A headless browser as long as the context lasts."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        for option in (*OPTIONS, f"--user-data-dir={profile}"):
            options.add_argument(option)
        browser = webdriver.Chrome(options=options, service=Service(DRIVER))
        try:
            yield browser
        finally:
            browser.quit()


def set_view(browser: "webdriver.Chrome", width: int, height: int, *, is_dark: bool = False) -> None:
    """Sets the size of the window in pixels and whether pages are asked to be dark."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def open_page(
    browser: "webdriver.Chrome",
    url: str,
    expected: Sequence[str] = (),
    *,
    unwanted: Sequence[str] = (),
    seconds: float = 60.0,
) -> str:
    """Opens a page, waits until it shows all the expected words and none of others, and gives the words it shows."""
    browser.get("about:blank")  # a change of what stands behind # alone loads nothing
    browser.get(url)
    deadline = time.monotonic() + seconds
    while True:
        words: str = browser.execute_script(WORDS)
        is_complete = all(word in words for word in expected) and not any(word in words for word in unwanted)
        if is_complete or time.monotonic() > deadline:
            return words
        time.sleep(0.5)


def save_picture(browser: "webdriver.Chrome", path: Path, seconds: float = 30.0) -> None:
    """Saves what the page shows once it has stopped changing."""
    deadline = time.monotonic() + seconds
    before, now = b"", browser.get_screenshot_as_png()
    while now != before and time.monotonic() < deadline:
        time.sleep(3)  # charts are drawn some time after the page says that it is loaded
        before, now = now, browser.get_screenshot_as_png()
    path.write_bytes(now)


def main() -> None:
    """Serves the logs and takes a picture of each tab, and of the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logdir", type=Path)
    parser.add_argument("out", type=Path, help="folder for dashboard.png, dashboard-*.png and report.png")
    args = parser.parse_args()
    with tensorboard(args.logdir) as url, chromium() as browser, tempfile.TemporaryDirectory() as folder:
        for tab in TABS:
            set_view(browser, tab.width, tab.height)
            open_page(browser, url + tab.address)
            save_picture(browser, args.out / tab.file)
        page = Path(folder) / "report.html"
        write_report([str(args.logdir)], str(page))
        set_view(browser, 1500, 2300)
        open_page(browser, page.as_uri())
        save_picture(browser, args.out / "report.png")


if __name__ == "__main__":
    main()
