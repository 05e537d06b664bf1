"""Runs one training after the other in the processes of one launch; see test_resume.py.

python -m torch.distributed.run --nproc-per-node=2 tests/resume_runs.py FOLDER JOBS, where JOBS is JSON: a list of
objects with the fields of `Job`. Rank 0 writes a job's final weights, steps and epochs to FOLDER/NAME.pt.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from drpo_lightning.batch import Sampling
from drpo_lightning.callbacks import FunctionReward
from drpo_lightning.datamodules import ArithmeticPrompts, RolloutDataModule
from drpo_lightning.modules import PolicyModule
from drpo_lightning.objectives import ClippedRatio, Decoupled
from drpo_lightning.rollout import TransformersEngine

MODEL = Path(__file__).parents[1] / "models" / "arithmetic"


@dataclass
class Job:
    """A training; `save` names a checkpoint by the epoch and micro-batch after which it is written."""

    name: str
    strategy: str
    micro_batches: int = 1
    resume: str | None = None
    save: dict[str, list[int]] = field(default_factory=dict)


class Watch(Callback):
    """Saves checkpoints, and keeps the final weights."""

    def __init__(self, folder, save):
        self.folder, self.save = folder, {tuple(moment): name for name, moment in save.items()}
        self.weights = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        name = self.save.get((trainer.current_epoch, batch_idx))
        if name is not None:
            trainer.save_checkpoint(self.folder / f"{name}.ckpt")

    def on_train_end(self, trainer, pl_module):
        self.weights = {name: tensor.clone() for name, tensor in pl_module.named_weights()}


def scattered_reward(completion_ids, **_):
    """0, 0.25, ..., 1: the samples of a prompt differ, whatever the model has learned."""
    return [sum(i * token for i, token in enumerate(ids, start=1)) % 5 / 4 for ids in completion_ids]


def run(folder, job, num_ranks):
    watch = Watch(folder, job.save)
    trainer = Trainer(
        accelerator="cpu",
        devices=num_ranks,
        strategy=DDPStrategy()
        if job.strategy == "ddp"
        else ModelParallelStrategy(data_parallel_size=num_ranks, tensor_parallel_size=1),
        callbacks=[FunctionReward(scattered_reward, name="scattered"), watch],
        accumulate_grad_batches=job.micro_batches,
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    module = PolicyModule(
        str(MODEL),
        objective=Decoupled(ClippedRatio()),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        temperature=1.5,
    )
    data = RolloutDataModule(
        TransformersEngine(),
        ArithmeticPrompts(max_operand=9, num_validation=20),
        str(MODEL),
        num_prompts=4,
        group_size=4,
        num_updates=2,
        sampling=Sampling(max_tokens=4, temperature=1.5),
    )
    trainer.fit(module, data, ckpt_path=None if job.resume is None else folder / f"{job.resume}.ckpt")
    if trainer.is_global_zero:
        result = {"weights": watch.weights, "steps": trainer.global_step, "epochs": trainer.current_epoch}
        torch.save(result, folder / f"{job.name}.pt")


if __name__ == "__main__":
    for fields in json.loads(sys.argv[2]):
        run(Path(sys.argv[1]), Job(**fields), int(os.environ["WORLD_SIZE"]))
    torch.distributed.destroy_process_group()
