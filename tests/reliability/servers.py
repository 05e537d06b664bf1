"""Real vLLM servers on the CPU for tests, each in a process group of its own."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from tests.conftest import MODEL_FOLDER

ROOT = Path(__file__).parents[2]
START_SECONDS = 180
KEY_VARIABLE, KEY = "DRPO_TEST_ROLLOUT_KEY", "sk-very-secret"
OPTIONS = [
    *("--dtype", "float32", "--max-model-len", "256"),
    # Without a worker process beside the engine's: a quicker start.
    *("--distributed-executor-backend", "vllm.v1.executor.uniproc_executor.UniProcExecutor"),
]


class Server:
    """A server that can be ended and started again at the same address.

    Args:
        port: where.
        log: file for what it prints.
    """

    def __init__(self, port, log):
        self.port, self.log = port, log
        self.url = f"http://127.0.0.1:{port}"
        self.process = None

    def start(self):
        with self.log.open("a") as output:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "drpo_lightning", "serve"),
                    *(str(MODEL_FOLDER), "--port", str(self.port), "--api-key-env", KEY_VARIABLE),
                    *OPTIONS,
                ],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", KEY_VARIABLE: KEY},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return self

    def wait(self):
        """Until it answers."""
        deadline = time.monotonic() + START_SECONDS
        while not self.answers():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.2)
        return self

    def answers(self):
        try:
            return self.ask("/health") == ""
        except OSError:
            return False

    def ask(self, path, *, as_json=True):
        request = urllib.request.Request(self.url + path, headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request, timeout=5) as response:
            text = response.read().decode()
        return json.loads(text) if text and as_json else text

    def signal(self, number):
        """Sends a signal to all its processes."""
        os.killpg(self.process.pid, number)

    def kill(self):
        """Ends all its processes."""
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait()
