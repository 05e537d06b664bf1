"""What is installed: the wheel has all of the package, says what it needs, and its types are seen."""

import os
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch

from drpo_lightning import __version__

ROOT = Path(__file__).parents[1]
EXTRAS = {"vllm", "lora", "math", "reasoning-gym", "figures", "docs", "trl", "dev"}
USER = """
from drpo_lightning.objectives import DRPO

reveal_type(DRPO(delta=0.2).delta)
DRPO(delta="wide")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "source"
    copy.mkdir()
    for name in ("drpo_lightning", "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(copy)], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    done = subprocess.run([*build, str(copy)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(folder.glob("*.whl"))


def test_the_wheel_has_every_file_of_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("drpo_lightning/")}
    files = [path for path in (ROOT / "drpo_lightning").rglob("*") if path.is_file()]
    assert packed == {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
    assert "drpo_lightning/py.typed" in packed


def test_the_wheel_names_its_version_its_extras_and_its_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (folder,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = Parser().parsestr(archive.read(f"{folder}/METADATA").decode())
        assert "drpo = drpo_lightning.__main__:main" in archive.read(f"{folder}/entry_points.txt").decode()
    assert metadata["Version"] == __version__
    assert set(metadata.get_all("Provides-Extra")) >= EXTRAS
    assert any(line.startswith("vllm") for line in metadata.get_all("Requires-Dist"))


def test_types_are_seen_where_the_package_is_installed(wheel, tmp_path):
    venv.create(tmp_path / "venv")
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "its_requirements.pth").write_text(str(Path(torch.__file__).parents[1]))
    (tmp_path / "user.py").write_text(USER)
    check = [sys.executable, "-m", "mypy", "--python-executable", str(tmp_path / "venv" / "bin" / "python"), "user.py"]
    done = subprocess.run(
        check, cwd=tmp_path, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False
    )
    assert 'Revealed type is "float"' in done.stdout.replace("builtins.", "")
    assert 'incompatible type "str"; expected "float"' in done.stdout
