"""Takes pictures of a run's TensorBoard in a headless browser.

Needs the packages `chromium` and `chromium-driver` of Debian, and `selenium` from PyPI.

    python scripts/screenshot.py runs/quickstart docs/dashboard.png
"""

import argparse
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

PORT = 6106
TABS = {"": "custom_scalars", "-histograms": "histograms", "-text": "text"}
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


def wait_until_served(url: str, timeout_seconds: float = 60.0) -> None:
    """Waits for the server's first answer."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, OSError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
        else:
            return


def main() -> None:
    """Serves the logs, opens each tab, waits for the charts and saves a picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logdir", type=Path)
    parser.add_argument("out", type=Path, help="PNG file of the dashboard; the other tabs are written beside it")
    parser.add_argument("--height", type=int, default=2300)
    args = parser.parse_args()
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", f"--logdir={args.logdir}", f"--port={PORT}", "--host=127.0.0.1"]
    )
    try:
        wait_until_served(f"http://127.0.0.1:{PORT}/data/runs")
        with tempfile.TemporaryDirectory() as profile:
            options = webdriver.ChromeOptions()
            for option in (*OPTIONS, f"--user-data-dir={profile}", f"--window-size=1500,{args.height}"):
                options.add_argument(option)
            browser = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
            try:
                for suffix, tab in TABS.items():
                    browser.get(f"http://127.0.0.1:{PORT}/#{tab}")
                    browser.refresh()
                    time.sleep(12)  # charts are drawn some time after the page says that it is loaded
                    path = args.out.with_name(f"{args.out.stem}{suffix}{args.out.suffix}")
                    browser.save_screenshot(str(path))
            finally:
                browser.quit()
    finally:
        server.terminate()
        server.wait(timeout=30)


if __name__ == "__main__":
    main()
