"""One run of the study, with the small model on one core."""

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

import drpo_lightning
from drpo_lightning.batch import RolloutBatch, Sampling
from drpo_lightning.callbacks import AdaptiveDelta, ExactMatchReward
from drpo_lightning.datamodules import ArithmeticPrompts, RolloutDataModule
from drpo_lightning.functional import probability_shift
from drpo_lightning.modules import PolicyModule
from drpo_lightning.rollout import TransformersEngine
from study.grid import ADAPTIVE, OBJECTIVES, SETTINGS, Run, row_of

VALIDATE_EVERY = 5
"""Rollouts from one validation to the next."""


class Recorder(Callback):
    """Keeps the validation curve, and sums over all tokens that were trained on."""

    def __init__(self) -> None:
        self.accuracy: list[float] = []
        self.sums = torch.zeros(7, dtype=torch.float64)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Keeps the share of held-out samples that are right."""
        self.accuracy.append(round(float(trainer.callback_metrics["val/pass@1"]), 5))

    def on_train_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ANN401
        batch: RolloutBatch,
        batch_idx: int,
    ) -> None:
        """Adds the tokens of an update; the first of a rollout has pi at the weights of the engine."""
        mask = batch.completion_mask
        pi, mu = outputs["policy_logprobs"][mask].cpu(), batch.rollout_logprobs[mask].cpu()
        weight = outputs["objective"].grad_weight[mask].cpu()
        shift = probability_shift(pi, mu).abs()
        first = float(batch_idx == 0)
        self.sums += torch.stack(
            [
                torch.tensor(float(len(pi))),
                (shift > 0.2).sum(),
                shift.sum(),
                (weight < 0).sum(),
                (~weight.isnan()).sum(),
                first * (pi - mu).abs().sum(),
                torch.tensor(first * len(pi)),
            ]
        ).double()

    def result(self) -> dict[str, Any]:
        """The figures of the run."""
        tokens, beyond, shift, corrective, weighted, mismatch, first = self.sums.tolist()
        curve = self.accuracy
        return {
            "initial": curve[0],
            "final": sum(curve[-2:]) / 2,
            "best": max(curve),
            "area": (sum(curve) - (curve[0] + curve[-1]) / 2) / (len(curve) - 1),
            "curve": curve,
            "beyond_0.2_fraction": beyond / tokens,
            "shift_abs_mean": shift / tokens,
            "corrective_fraction": corrective / max(weighted, 1),
            "mismatch_log_ratio_abs_mean": mismatch / first,
        }


def fit(
    module: PolicyModule,
    data: RolloutDataModule,
    *callbacks: Callback,
    num_rollouts: int,
    **trainer: Any,  # noqa: ANN401
) -> dict[str, Any]:
    """Trains, validating at the start and every few rollouts. Once weights are NaN the accuracy counts as 0."""
    recorder = Recorder()
    every = min(VALIDATE_EVERY, num_rollouts)
    loop = Trainer(
        devices=1,
        max_epochs=num_rollouts,
        check_val_every_n_epoch=every,
        num_sanity_val_steps=-1,
        gradient_clip_val=1.0,
        callbacks=[*callbacks, recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **trainer,
    )
    started = time.perf_counter()
    diverged = False
    try:
        loop.fit(module, data)
    except ValueError as error:
        if "NaN or infinite" not in str(error):
            raise
        diverged = True
        recorder.accuracy += [0.0] * (1 + num_rollouts // every - len(recorder.accuracy))
    return {
        **recorder.result(),
        "diverged": diverged,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": f"drpo-lightning {drpo_lightning.__version__}, torch {torch.__version__}",
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Leaves the console to the table of runs."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "transformers")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(action="ignore"):
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@quiet()
def execute(run: Run) -> dict[str, Any]:
    """Trains the small model on one core and returns a row's figures."""
    torch.set_num_threads(1)
    seed_everything(run.seed, verbose=False)
    setting = SETTINGS[run.setting]
    module = PolicyModule(
        model="models/arithmetic",
        objective=OBJECTIVES[run.objective],
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=run.learning_rate, weight_decay=0.01),
    )
    data = RolloutDataModule(
        engine=TransformersEngine(dtype=setting.engine_dtype),  # type: ignore[arg-type]
        prompts=ArithmeticPrompts(),
        val_prompts=ArithmeticPrompts(split="validation"),
        model="models/arithmetic",
        num_updates=setting.num_updates,
        sampling=Sampling(max_tokens=8),
        val_num_samples=2,
        seed=run.seed,
    )
    callbacks: list[Callback] = [ExactMatchReward()]
    if run.objective in ADAPTIVE:
        callbacks.append(AdaptiveDelta(**ADAPTIVE[run.objective]))
    result = fit(module, data, *callbacks, num_rollouts=run.num_rollouts, accelerator="cpu")
    return row_of(run, result)
