"""A folder for adapters lasts as long as its process, and not longer than the next start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from drpo_lightning.rollout.adapter_folder import AdapterFolder, remove_left_folders

HOLD = """
import sys, time
from drpo_lightning.rollout.adapter_folder import AdapterFolder
folder = AdapterFolder()
print(folder.name, flush=True)
time.sleep(60)
"""


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files, of this process and of those that it starts."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def make_old(folder):
    os.utime(folder, (0, 0))


def test_it_is_removed_once_its_process_was_killed_and_not_before(temporary):
    with subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True) as holder:
        folder = Path(holder.stdout.readline().strip())
        assert folder.parent == temporary
        make_old(folder)
        remove_left_folders()
        assert folder.is_dir()
        holder.kill()
        holder.wait()
    own = AdapterFolder()
    assert list(temporary.iterdir()) == [Path(own.name)]
    own.cleanup()
    assert not list(temporary.iterdir())


def test_one_that_was_just_made_and_others_are_left(temporary):
    for name in ("drpo-adapter-young", "other"):
        (temporary / name).mkdir()
    make_old(temporary / "other")
    remove_left_folders()
    assert sorted(path.name for path in temporary.iterdir()) == ["drpo-adapter-young", "other"]
