"""A reward of one's own, as a class and as a function, in a short training.

    python examples/custom_reward.py

`RightDigits` gives a part of the reward to a sum that is partly right. `is_short` is a plain function, which takes the
arguments that TRL's reward functions take. Their weighted sum is what is learned. In a configuration they stand under
`trainer.callbacks`, see docs/own_reward.md.
"""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything

from drpo_lightning.batch import Sampling
from drpo_lightning.callbacks import FunctionReward, RewardCallback, RolloutProgress, RolloutStatistics
from drpo_lightning.datamodules import ArithmeticPrompts, RolloutDataModule
from drpo_lightning.modules import PolicyModule
from drpo_lightning.objectives import DRPO
from drpo_lightning.rewards import RewardBatch
from drpo_lightning.rollout import TransformersEngine

MODEL = "models/arithmetic"


class RightDigits(RewardCallback):
    """The share of the answer's digits that stand in their place."""

    required_columns = ("answer",)  # a data set without it is refused before the run starts

    def score(self, batch: RewardBatch) -> Sequence[float]:
        """One number for each completion; None would say that the reward does not apply to it."""
        return [
            sum(a == b for a, b in zip(text, answer, strict=False)) / max(len(text), len(answer))
            for text, answer in zip(batch.completions, batch.column("answer"), strict=True)
        ]


def is_short(completions: Sequence[str], **_: Any) -> list[float]:  # noqa: ANN401 - columns of the data set
    """1 for at most three characters: no sum here has more."""
    return [float(len(text) <= 3) for text in completions]


def main() -> None:
    """Trains for a few rollouts; a line for each shows the mean reward."""
    seed_everything(0)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=6,  # rollouts
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        callbacks=[RightDigits(), FunctionReward(is_short, weight=0.1), RolloutStatistics(), RolloutProgress()],
    )
    module = PolicyModule(MODEL, DRPO(delta=0.2), optimizer=lambda p: torch.optim.AdamW(p, lr=1.5e-4))
    data = RolloutDataModule(
        TransformersEngine(), ArithmeticPrompts(), MODEL, num_prompts=32, sampling=Sampling(max_tokens=8)
    )
    trainer.fit(module, data)
    for name in ("reward/rightdigits/mean", "reward/is_short/mean", "reward/mean"):
        print(f"{name:24}{float(trainer.callback_metrics[name]):.3f}")


if __name__ == "__main__":
    main()
