"""Two diagnostics of one's own, as callbacks.

    python examples/custom_callback.py

`Variety` looks at rollouts: how many of a prompt's completions differ. `CertainTokens` looks at the tokens of every
update: how far the policy has moved where the engine was sure of itself. A callback logs by `log_metrics`, which puts
every value at the optimizer steps completed. In a configuration they stand under `trainer.callbacks`.
"""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from drpo_lightning.batch import Rollout, Sampling
from drpo_lightning.callbacks import ExactMatchReward, RolloutStatistics
from drpo_lightning.callbacks.update_statistics import CompletionTokens, TokenValues, UpdateStatistics
from drpo_lightning.datamodules import ArithmeticPrompts, RolloutDataModule
from drpo_lightning.functional import probability_shift
from drpo_lightning.logs import log_metrics
from drpo_lightning.metrics import TokenStatistics
from drpo_lightning.modules import PolicyModule
from drpo_lightning.rollout import RolloutHooks, TransformersEngine

MODEL = "models/arithmetic"
QUIET: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)


class Variety(Callback, RolloutHooks):
    """Logs `completions/distinct_fraction`: different completions of a prompt, as a share of its samples."""

    def on_rollout_end(self, trainer: Trainer, pl_module: LightningModule, rollout: Rollout) -> None:
        """Counts, on every rank its own part of the rollout; `reduce` is collective."""
        groups = [rollout.texts[i : i + rollout.group_size] for i in range(0, len(rollout), rollout.group_size)]
        distinct = sum(len(set(group)) for group in groups) / len(rollout)
        self.mean = float(trainer.strategy.reduce(torch.tensor(distinct, device=pl_module.device), reduce_op="mean"))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:  # noqa: ANN401
        """Logs before the first update; Lightning takes no values while a rollout is sampled."""
        if batch[1] == 0:
            log_metrics(trainer, pl_module, {"completions/distinct_fraction": self.mean})


class CertainTokens(UpdateStatistics):
    """Logs `certain/shift_mean` and `certain/shift_max`: |pi - mu| of tokens with mu of at least `min_probability`.

    Args:
        min_probability: least mu of a token that counts.
    """

    def __init__(self, min_probability: float = 0.9) -> None:
        super().__init__(TokenStatistics(means=["certain/shift_mean"], maxima=["certain/shift_max"]))
        self.min_probability = min_probability

    def token_values(self, tokens: CompletionTokens) -> TokenValues:
        """One value for each token; NaN is left out. Micro-batches and ranks are added up by the base class."""
        shift = probability_shift(tokens.policy_logprobs, tokens.rollout_logprobs).abs()
        shift = torch.where(tokens.rollout_logprobs.exp() >= self.min_probability, shift, torch.nan)
        return TokenValues({"certain/shift_mean": shift, "certain/shift_max": shift}, {})


class Show(Callback):
    """Prints the diagnostics after each rollout."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """All values of the rollout are logged by now."""
        names = ("completions/distinct_fraction", "certain/shift_mean", "certain/shift_max")
        print("  ".join(f"{name} {float(trainer.callback_metrics[name]):.3f}" for name in names))


if __name__ == "__main__":
    seed_everything(0)
    callbacks = [ExactMatchReward(), RolloutStatistics(), Variety(), CertainTokens(), Show()]
    trainer = Trainer(accelerator="cpu", max_epochs=4, log_every_n_steps=1, callbacks=callbacks, **QUIET)
    module = PolicyModule(MODEL, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1.5e-4))
    samples: dict[str, Any] = {"num_prompts": 16, "sampling": Sampling(max_tokens=8)}
    trainer.fit(module, RolloutDataModule(TransformersEngine(), ArithmeticPrompts(), MODEL, **samples))
