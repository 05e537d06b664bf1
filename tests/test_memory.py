"""What a rank holds, as `benchmarks/memory.py` measures it in processes of their own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def measured():
    """Bytes per parameter of the whole model on each of two ranks of FSDP2, by what takes them."""
    command = [sys.executable, "benchmarks/memory.py", "--strategy=fsdp2", "--ranks=2", "--hidden=512", "--layers=16"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = re.findall(r"^(\w[\w' ]+?) +\d+ MiB +(\S+) B/parameter +\d+ MiB +(\S+) B/parameter", result.stdout, re.M)
    return {name: (float(first), float(second)) for name, first, second in rows}


def test_parameters_and_the_optimizers_moments_are_shared_evenly(measured):
    assert measured["parameters"] == pytest.approx((2, 2), abs=0.02)
    assert measured["AdamW's moments"] == pytest.approx((4, 4), abs=0.04)


def test_no_rank_ever_holds_the_whole_model(measured):
    # A whole float32 copy beside the shard of 2 bytes would be 6. The first rank reads the checkpoint, of 2 bytes.
    first, second = measured["peak of loading"]
    assert 2 < second < 4
    assert second < first < 6
