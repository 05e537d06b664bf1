"""A small run that is watched, and the command line on a small quickstart."""

import csv
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from drpo_lightning import cli
from drpo_lightning.datamodules import ArithmeticPrompts
from drpo_lightning.rollout import RolloutHooks

ROOT = Path(__file__).parents[2]
VALIDATION = {"val_prompts": ArithmeticPrompts("validation", max_operand=9, num_validation=8)}
SMALL = [
    "--config=configs/quickstart.yaml",
    "--data.engine=drpo_lightning.rollout.TransformersEngine",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--data.num_prompts=8",
    "--data.group_size=4",
    "--data.num_updates=1",
    "--data.val_num_samples=1",
]


class Watcher(Callback, RolloutHooks):
    """Keeps the steps at which things happen, the rollouts, and the weights after every update."""

    def __init__(self):
        self.rollouts, self.validations, self.weights, self.sampled_with = [], [], {}, []

    def on_engine_refresh(self, trainer, pl_module, engine):
        self.sampled_with.append((trainer.validating, flat(pl_module)))

    def on_rollout_end(self, trainer, pl_module, rollout):
        self.rollouts.append(rollout)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.setdefault(trainer.global_step, flat(pl_module))

    def on_validation_end(self, trainer, pl_module):
        self.validations.append(trainer.global_step)


def flat(pl_module):
    return torch.cat([parameter.detach().flatten().clone() for parameter in pl_module.parameters()])


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def scalars_of_csv(folder):
    """Scalars of a CSVLogger: (step, value) by name."""
    found = {}
    with next(Path(folder).rglob("metrics.csv")).open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    found.setdefault(name, []).append((int(row["step"]), float(value)))
    return found


@pytest.fixture
def fit(make_run):
    """Fits a small run that validates, and returns it with its watcher."""

    def fit(*callbacks, trainer=None, data=None, ckpt_path=None, **settings):
        watcher = Watcher()
        run = make_run(watcher, *callbacks, trainer=trainer, data=VALIDATION | (data or {}), **settings)
        run.fit(ckpt_path=ckpt_path)
        return run, watcher

    return fit


@pytest.fixture
def drpo(monkeypatch, tmp_path):
    """Runs `drpo` on the quickstart, made small and without vLLM; files go to a temporary folder."""

    def drpo(command, *arguments, logger=f"--trainer.logger.init_args.save_dir={tmp_path}"):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["drpo", command, *SMALL, logger, *arguments])
        monkeypatch.setattr(sys, "argv", [*sys.argv, f"--trainer.default_root_dir={tmp_path}"])
        cli.main()

    return drpo
