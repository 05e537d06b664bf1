"""`make quickstart`: trains the small model on the best engine that this machine has."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Runs `drpo fit` with the quickstart's configuration and any further arguments."""
    command = [sys.executable, "-m", "drpo_lightning", "fit", "--config", "configs/quickstart.yaml"]
    if importlib.util.find_spec("vllm") is None:
        print("vLLM is not installed: the rollouts run on the transformers engine", flush=True)
        command.append("--data.engine=drpo_lightning.rollout.TransformersEngine")
    if not torch.cuda.is_available():
        command.append("--trainer.accelerator=cpu")  # Apple's has no float64
    environment = {"HF_HUB_OFFLINE": "1", **os.environ}  # model and data are part of the project
    try:
        sys.exit(subprocess.run([*command, *sys.argv[1:]], check=False, cwd=ROOT, env=environment).returncode)
    except KeyboardInterrupt:
        sys.exit(130)  # the child got the signal too and has ended in order


if __name__ == "__main__":
    main()
