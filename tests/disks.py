"""Small file systems that fill up, or that nobody can write to."""

import subprocess
from pathlib import Path

import pytest


class Disk:
    """A mounted file system in memory.

    Raises:
        OSError: if this process may not mount one.
    """

    def __init__(self, folder: Path, kib: int):
        self.folder = folder
        folder.mkdir()
        self._run("mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder)

    @staticmethod
    def _run(*command):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise OSError(result.stderr)

    def resize(self, kib):
        self._run("mount", "-o", f"remount,rw,size={kib}k", self.folder)

    def make_read_only(self):
        self._run("mount", "-o", "remount,ro", self.folder)

    def close(self):
        self._run("umount", "--lazy", self.folder)


@pytest.fixture
def make_disk(tmp_path):
    """Mounts file systems of some KiB; skips where that takes rights that we have not."""
    disks = []

    def make(kib, name="disk"):
        try:
            disks.append(Disk(tmp_path / name, kib))
        except OSError as error:
            pytest.skip(f"no file system can be mounted: {error}")
        return disks[-1]

    yield make
    for disk in disks:
        disk.close()
