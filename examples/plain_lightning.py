"""The policy module in plain Lightning: our LightningModule on a DataLoader of one's own.

    python examples/plain_lightning.py

Whatever yields `RolloutBatch`es can be trained on. This data set samples them from an engine when it is iterated over;
completions of a file, or of an engine elsewhere, would do too, as long as log mu of every token comes with them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoTokenizer

from drpo_lightning.batch import Rollout, RolloutBatch, Sampling
from drpo_lightning.datamodules import ArithmeticPrompts
from drpo_lightning.functional import group_advantages
from drpo_lightning.modules import PolicyModule
from drpo_lightning.objectives import DRPO
from drpo_lightning.rollout import TransformersEngine

MODEL = "models/arithmetic"
NUM_PROMPTS, GROUP_SIZE, NUM_UPDATES = 32, 8, 4
QUIET: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)


class Rollouts(IterableDataset[RolloutBatch]):
    """A pass over it is a rollout with the present weights, served as one micro-batch per update."""

    def __init__(self, module: PolicyModule) -> None:
        self.module = module
        self.tokenizer = AutoTokenizer.from_pretrained(MODEL)
        self.rows = ArithmeticPrompts().load()
        self.place = 0
        self.engine = TransformersEngine()
        self.engine.start(MODEL, device=torch.device("cpu"), num_ranks=1, seed=0)

    def __len__(self) -> int:
        return NUM_UPDATES  # with a length, Lightning takes no batch ahead of the last update

    def __iter__(self) -> Iterator[RolloutBatch]:
        rollout = self.sample()
        print(f"after {self.module.trainer.global_step:2} updates: reward {rollout.rewards.mean():.3f}")
        advantages = group_advantages(rollout.rewards, GROUP_SIZE)
        for rows in torch.randperm(len(rollout)).chunk(NUM_UPDATES):
            sizes = {"num_update_tokens": sum(len(rollout.completions[i].token_ids) for i in rows.tolist())}
            sizes |= {"num_update_sequences": len(rows)}
            yield RolloutBatch.collate(rollout, rows.tolist(), advantages, pad_token_id=0, **sizes)

    def sample(self) -> Rollout:
        """Scored completions of the next prompts."""
        rows = self.rows[self.place : self.place + NUM_PROMPTS]
        self.place += NUM_PROMPTS
        prompt_ids = [self.tokenizer(row["prompt"]).input_ids for row in rows]
        self.engine.load_weights(self.module.named_weights())
        stop = [self.tokenizer.eos_token_id]
        groups = self.engine.generate(prompt_ids, Sampling(8), num_samples=GROUP_SIZE, stop_token_ids=stop)
        completions = [completion for group in groups for completion in group]
        texts = self.tokenizer.batch_decode([c.token_ids for c in completions], skip_special_tokens=True)
        answers = [row["answer"] for row in rows for _ in range(GROUP_SIZE)]
        rewards = torch.tensor([float(text == answer) for text, answer in zip(texts, answers, strict=True)])
        prompts = [row["prompt"] for row in rows for _ in range(GROUP_SIZE)]
        repeated_ids = [ids for ids in prompt_ids for _ in range(GROUP_SIZE)]
        return Rollout(prompts, repeated_ids, completions, texts, {"answer": answers}, GROUP_SIZE, rewards)


if __name__ == "__main__":
    seed_everything(0)
    module = PolicyModule(MODEL, DRPO(delta=0.2), optimizer=lambda p: torch.optim.AdamW(p, lr=2e-4))
    trainer = Trainer(accelerator="cpu", max_epochs=8, limit_val_batches=0, gradient_clip_val=1.0, **QUIET)
    trainer.fit(module, DataLoader(Rollouts(module), batch_size=None))
