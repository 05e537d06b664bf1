"""Trains with a mixture, a curriculum and dynamic sampling; see test_prompt_ranks.py.

python -m torch.distributed.run --nproc-per-node=N tests/reliability/prompt_ranks.py FOLDER NAME [CHECKPOINT]. Rank 0
writes the prompts of every rollout, over all ranks, the curriculum's state and the logged figures to FOLDER/NAME.pt,
and a checkpoint in the middle of the third rollout to FOLDER/NAME.ckpt.
"""

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer

from drpo_lightning.batch import Sampling
from drpo_lightning.callbacks import FunctionReward, PromptStatistics
from drpo_lightning.datamodules import ArithmeticPrompts, MixedPrompts, PassRateCurriculum, RolloutDataModule
from drpo_lightning.modules import PolicyModule
from drpo_lightning.rollout import RolloutHooks, TransformersEngine

MODEL = Path(__file__).parents[2] / "models" / "arithmetic"


class Watch(Callback, RolloutHooks):
    """Keeps prompts and figures, and saves a checkpoint."""

    def __init__(self, path):
        self.path = path
        self.prompts = []
        self.figures = []
        self.dynamic_sampling = []

    def on_rollout_end(self, trainer, pl_module, rollout):
        own = sorted(zip(rollout.positions, rollout.prompt_numbers, strict=True))  # ranks may have exchanged some
        parts = [own]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, own)
        figures = trainer.datamodule.dynamic_sampling_statistics
        self.dynamic_sampling.append({name: value for name, value in figures.items() if name != "seconds"})
        self.prompts.append([number for _, number in sorted(pair for part in parts for pair in part)])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.figures.append({key: float(v) for key, v in trainer.callback_metrics.items() if key.startswith("data/")})
        if (trainer.current_epoch, batch_idx) == (2, 0):
            trainer.save_checkpoint(self.path)


def scattered_reward(completion_ids, **_):
    """0, 0.5 or 1: the samples of most prompts differ, whatever the model has learned."""
    return [sum(i * token for i, token in enumerate(ids, start=1)) % 3 / 2 for ids in completion_ids]


def main(folder, name, checkpoint=None):
    watch = Watch(folder / f"{name}.ckpt")
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy="ddp",
        callbacks=[FunctionReward(scattered_reward, name="scattered"), PromptStatistics(), watch],
        max_epochs=6,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    # The policy stays as it is: ranks add up gradients in another order, and samples would follow.
    module = PolicyModule(str(MODEL), optimizer=lambda p: torch.optim.SGD(p, lr=0.0), temperature=1.5)
    data_sets = {f"seed {seed}": ArithmeticPrompts(max_operand=2, num_validation=1, seed=seed) for seed in (1, 2)}
    data = RolloutDataModule(
        TransformersEngine(),
        MixedPrompts(data_sets, {"seed 1": 2, "seed 2": 1}),
        str(MODEL),
        num_prompts=4,
        group_size=4,
        num_updates=2,
        sampling=Sampling(max_tokens=4, temperature=1.5),
        curriculum=PassRateCurriculum(max_rate=0.25, num_samples=4, pass_threshold=0.5, max_skips=2),
        dynamic_sampling_rounds=2,
    )
    trainer.fit(module, data, ckpt_path=None if checkpoint is None else folder / checkpoint)
    schedule = data.state_dict()["schedule"]
    if trainer.is_global_zero:
        seen = {"prompts": watch.prompts, "figures": watch.figures, "dynamic_sampling": watch.dynamic_sampling}
        torch.save({**seen, "schedule": schedule}, folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
    torch.distributed.destroy_process_group()
