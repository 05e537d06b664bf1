"""The same question for SmolLM2-135M-Instruct on a GPU: `python -m study.smollm2 --model FOLDER`."""

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything

from drpo_lightning.batch import Sampling
from drpo_lightning.callbacks import NumericAnswerReward
from drpo_lightning.datamodules import ArithmeticPrompts, RolloutDataModule
from drpo_lightning.modules import PolicyModule
from drpo_lightning.rollout import VLLMEngine
from study.grid import MAIN, OBJECTIVES, Run, row_of
from study.pool import make
from study.run import fit, quiet

RESULTS = Path(__file__).parent / "results_smollm2.jsonl"
TEMPLATE = "What is {a} + {b}? Answer with the number only."
ENGINES = {"SmolLM2 bf16": {}, "SmolLM2 fp8": {"quantization": "fp8"}}
LEARNING_RATES = (1e-5, 3e-5, 1e-4)
NUM_ROLLOUTS = 60
NUM_UPDATES = 8


@quiet()
def execute(run: Run) -> dict[str, Any]:
    """Trains in bfloat16 with float32 master weights, on rollouts of vLLM in the same process."""
    seed_everything(run.seed, verbose=False)
    model = os.environ["STUDY_MODEL"]
    module = PolicyModule(
        model=model,
        objective=OBJECTIVES[run.objective],
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=run.learning_rate, weight_decay=0.01),
    )
    engine = VLLMEngine(
        process="in_process",
        dtype="bfloat16",
        max_model_len=256,
        gpu_memory_utilization=0.1,
        kv_cache_gib=2.0,
        enforce_eager=True,
        engine_kwargs=ENGINES[run.setting],
        sleep="never",
    )
    task: dict[str, Any] = {"max_operand": 99, "num_validation": 200, "template": TEMPLATE}
    data = RolloutDataModule(
        engine=engine,
        prompts=ArithmeticPrompts(**task),
        val_prompts=ArithmeticPrompts(**task, split="validation"),
        model=model,
        prompt_format="chat",
        num_updates=NUM_UPDATES,
        sampling=Sampling(max_tokens=32),
        val_num_samples=4,
        seed=run.seed,
    )
    result = fit(
        module, data, NumericAnswerReward(), num_rollouts=run.num_rollouts, accelerator="gpu", precision="bf16-mixed"
    )
    return row_of(run, result)


def main() -> None:
    """The main objectives on both engines, learning rates as given."""
    parser = argparse.ArgumentParser(prog="python -m study.smollm2", description=__doc__)
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct, see scripts/smollm2.py")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--workers", type=int, default=6, help="runs at a time on the GPU")
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="starts no run after so long")
    parser.add_argument("--rollouts", type=int, default=NUM_ROLLOUTS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--learning-rates", type=float, nargs="*", default=LEARNING_RATES)
    parser.add_argument("--objectives", nargs="*", default=list(MAIN))
    parser.add_argument("--settings", nargs="*", default=list(ENGINES))
    arguments = parser.parse_args()
    os.environ["STUDY_MODEL"] = arguments.model
    runs = [
        Run("smollm2", name, setting, seed, rate, arguments.rollouts)
        for seed in range(arguments.seeds)
        for rate in arguments.learning_rates
        for setting in arguments.settings
        for name in arguments.objectives
    ]
    make(execute, runs, arguments.results, arguments.workers, time.time() + arguments.max_seconds, fresh_processes=True)


if __name__ == "__main__":
    main()
