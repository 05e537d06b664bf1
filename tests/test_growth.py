"""The benchmark of growth runs, and shows what is computed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = ["--hidden=64", "--layers=1", "--tokens=128", "--prompts=4", "--points=2", "--repeats=1", "--micro-batches=2"]


@pytest.mark.reliability
def test_a_longer_completion_costs_padding_only(tmp_path):
    command = [sys.executable, "benchmarks/growth.py", "--quantities", "longest", "sequences", *TINY]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line.split("|")[1:-1] for line in done.stdout.splitlines()[3:]]
    assert [line[0].strip() for line in lines] == ["longest"] * 2 + ["sequences"] * 2
    assert [float(line[1]) for line in lines] == [1, 2] * 2
    (tokens, padded), (more_tokens, more_padded) = ([float(cell) for cell in line[2:4]] for line in lines[:2])
    assert abs(more_tokens - tokens) < 0.1 * tokens
    assert more_padded > 1.2 * padded > 1.2 * tokens
    assert all(float(seconds) > 0 for line in lines for seconds in line[4:7])
