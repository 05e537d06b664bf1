"""What the diagnostics cost: seconds in each callback against seconds in the training steps of the same run.

    python scripts/smollm2.py --out models/smollm2
    python benchmarks/callbacks.py --model models/smollm2

Every callback stands at its default interval. The run is long enough that those which act on every tenth rollout do
so as often as in a long one.
"""

import argparse
import functools
import os
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from drpo_lightning.batch import Sampling
from drpo_lightning.callbacks import (
    CompletionLogger,
    Dashboard,
    Divergence,
    DivergenceProxy,
    Guardrail,
    HyperparameterLogger,
    MaskStatistics,
    MismatchAndDrift,
    NumericAnswerReward,
    PolicyEntropy,
    PolicyShift,
    RolloutStatistics,
    ShiftMap,
    TokenTable,
)
from drpo_lightning.datamodules import ArithmeticPrompts, RolloutDataModule
from drpo_lightning.modules import PolicyModule
from drpo_lightning.objectives import DRPO
from drpo_lightning.rollout import TransformersEngine

HOOKS = [name for name in dir(Callback) if name.startswith("on_")] + ["on_rollout_start", "on_engine_refresh"]
HOOKS += ["on_rollout_end"]


class StepStart(Callback):
    """The last callback before a training step."""

    def on_train_batch_start(self, *_: Any) -> None:  # noqa: ANN401
        """Starts the clock."""
        self.started = time.perf_counter()


class StepEnd(Callback):
    """The first callback after it.

    Args:
        start: holds the time of the start.
    """

    def __init__(self, start: StepStart) -> None:
        self.start = start
        self.seconds = 0.0

    def on_train_batch_end(self, *_: Any) -> None:  # noqa: ANN401
        """Stops the clock."""
        self.seconds += time.perf_counter() - self.start.started


def timed(callback: Callback, seconds: dict[str, float]) -> Callback:
    """Makes a callback add the time in its hooks to `seconds`, under the name of its class."""

    def wrap(hook: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(hook)
        def measured(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            started = time.perf_counter()
            try:
                return hook(*args, **kwargs)
            finally:
                seconds[type(callback).__name__] += time.perf_counter() - started

        return measured

    for name in HOOKS:
        if hasattr(callback, name):
            setattr(callback, name, wrap(getattr(callback, name)))
    return callback


def measure(model: str, *, num_rollouts: int, num_prompts: int, folder: str) -> tuple[dict[str, float], float]:
    """Seconds in each callback, and in the training steps."""
    seed_everything(0, verbose=False)
    seconds: dict[str, float] = defaultdict(float)
    diagnostics = [PolicyShift(), Divergence(), MaskStatistics(), MismatchAndDrift(), DivergenceProxy(), TokenTable()]
    diagnostics += [PolicyEntropy(), ShiftMap(), RolloutStatistics(), CompletionLogger(), Guardrail(), Dashboard()]
    diagnostics += [HyperparameterLogger()]
    start = StepStart()
    end = StepEnd(start)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=num_rollouts,
        accumulate_grad_batches=2,
        logger=TensorBoardLogger(folder),
        log_every_n_steps=1,
        callbacks=[end, *(timed(callback, seconds) for callback in diagnostics), NumericAnswerReward(), start],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    module = PolicyModule(
        model, DRPO(0.2), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.01)
    )
    data = RolloutDataModule(
        engine=TransformersEngine(),
        prompts=ArithmeticPrompts(template="What is {a} + {b}? Answer with the number only."),
        model=model,
        prompt_format="chat",
        num_prompts=num_prompts,
        num_updates=4,
        sampling=Sampling(max_tokens=32),
    )
    trainer.fit(module, data)
    return dict(seconds), end.seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--rollouts", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=8, help="per rollout, with 8 completions each")
    settings = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        seconds, steps = measure(
            settings.model, num_rollouts=settings.rollouts, num_prompts=settings.prompts, folder=folder
        )
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} thread(s)")
    print(f"{settings.rollouts} rollouts of {8 * settings.prompts} completions, 4 updates each")
    print(f"{'training steps':22} {steps:9.2f} s")
    for name, value in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"{name:22} {value:9.2f} s {value / steps:8.2%}")
    print(f"{'all callbacks':22} {sum(seconds.values()):9.2f} s {sum(seconds.values()) / steps:8.2%}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
