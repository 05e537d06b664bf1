"""What a killed run is made of besides the product's own parts: rewards that draw, a journal, and what kills it."""

import json
import os
import random
import signal
import threading
import time
from io import BytesIO
from pathlib import Path

import numpy
import torch
from lightning.pytorch import Callback

from drpo_lightning import checkpoints
from drpo_lightning.callbacks import RewardCallback
from drpo_lightning.rollout import RolloutHooks


def die():
    """Sends this process SIGKILL, or the signal in the environment variable SIGNAL."""
    os.kill(os.getpid(), int(os.environ.get("SIGNAL") or signal.SIGKILL))


class Moment:
    """Kills the process the n-th time that it comes by a place, as the environment variable KILL says: `place:n:x`."""

    def __init__(self):
        place, count, fraction = (os.environ.get("KILL") or "nowhere:0:0").split(":")
        self.place, self.left, self.fraction = place, int(count), float(fraction)
        if os.environ.get("SIGNAL") and os.environ.get("LOCAL_RANK", "0") != "0":
            self.place = "nowhere"  # one rank is enough

    def comes_by(self, place):
        """True where the process is to die."""
        if place != self.place:
            return False
        self.left -= 1
        return self.left == 0


class DrawingReward(RewardCallback):
    """Draws from all three global generators, and counts its calls: both must survive."""

    def __init__(self):
        super().__init__(name="drawing")
        self.moment, self.calls = Moment(), 0

    def score(self, batch):
        self.calls += 1
        if self.moment.comes_by("reward"):
            die()
            time.sleep(60)  # a judge that takes its time
        numbers = [random.random() + float(numpy.random.rand()) + float(torch.rand(())) for _ in batch.completions]  # noqa: NPY002
        return [number + self.calls + len(ids) for number, ids in zip(numbers, batch.completion_ids, strict=True)]

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state_dict):
        self.calls = state_dict["calls"]


class Journal(Callback, RolloutHooks):
    """Writes every rollout, and the weights at the end. What is made twice must be the same."""

    def __init__(self, folder: str):
        self.folder = Path(folder)

    def on_rollout_end(self, trainer, pl_module, rollout):
        entry = {
            "step": trainer.global_step,
            "prompts": rollout.prompts,
            "texts": rollout.texts,
            "logprobs": [list(map(float, completion.logprobs)) for completion in rollout.completions],
            "rewards": rollout.rewards.tolist(),
        }
        path = self.folder / f"rollout-{trainer.datamodule.iteration}-rank-{trainer.global_rank}.json"
        text = json.dumps(entry)
        if path.exists() and path.read_text() != text:
            path.with_suffix(".differs").write_text(text)
            raise AssertionError(f"{path} was made anew, and differs")
        partial = path.with_suffix(".partial")
        partial.write_text(text)
        partial.replace(path)

    def on_train_end(self, trainer, pl_module):
        weights = {name: tensor.clone() for name, tensor in pl_module.named_weights()}
        if trainer.is_global_zero:
            torch.save(weights, self.folder / "weights.pt")


class Ledger(Callback):
    """Writes down every micro-batch that is trained on: a line for each, with the rollout that it is of."""

    def __init__(self, folder: str):
        self.path = Path(folder) / "ledger.jsonl"

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rollout = trainer.datamodule.rollout
        entry = {
            "rollout": trainer.datamodule.iteration - 1,
            "batch": batch_idx,
            "samples": batch.sample_ids.tolist(),
            "prompts": rollout.prompts,
            "completions": [completion.token_ids for completion in rollout.completions],
            "staleness": rollout.staleness.tolist(),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


class Killer(Callback, RolloutHooks):
    """Kills the run in a rollout, an update, a save or a validation."""

    def __init__(self):
        self.moment, self.is_over = Moment(), False

    def setup(self, trainer, pl_module, stage):
        save, replace = torch.save, checkpoints._replace

        def killed_save(content, path, **settings):
            if not str(path).endswith(("meta.pt", ".partial")) or not self.moment.comes_by("write"):
                return save(content, path, **settings)
            whole = BytesIO()
            save(content, whole)
            Path(path).write_bytes(whole.getvalue()[: int(self.moment.fraction * whole.tell())])
            return die()

        def killed_replace(new, path):
            if self.moment.comes_by("rename"):
                die()
            replace(new, path)
            if self.moment.comes_by("renamed"):
                die()

        torch.save, checkpoints._replace = killed_save, killed_replace

    def on_rollout_start(self, trainer, pl_module):
        if self.moment.comes_by("rollout"):
            threading.Timer(0.3 * self.moment.fraction, die).start()

    def on_engine_refresh(self, trainer, pl_module, engine):
        if self.moment.comes_by("sampling"):
            threading.Timer(0.05, die).start()

    def on_rollout_end(self, trainer, pl_module, rollout):
        if self.moment.comes_by("rolled"):
            die()

    def on_before_backward(self, trainer, pl_module, loss):
        if self.moment.comes_by("backward"):
            die()

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if self.moment.comes_by("update"):
            die()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.moment.comes_by("batch"):
            die()

    def on_validation_start(self, trainer, pl_module):
        if trainer.sanity_checking and self.moment.comes_by("checking"):
            die()

    def on_train_end(self, trainer, pl_module):
        self.is_over = True

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        if self.is_over and self.moment.comes_by("last"):
            die()

    def on_validation_end(self, trainer, pl_module):
        if self.moment.comes_by("validated"):
            die()

    def on_train_epoch_end(self, trainer, pl_module):
        if self.moment.comes_by("epoch"):
            die()


def lengths(completion_ids, **_):
    """A reward that varies."""
    return [float(len(ids)) for ids in completion_ids]


def fails(completion_ids, **_):
    """A reward that meets a service that refuses its key."""
    raise ConnectionError(f"refused, after {len(completion_ids)} completions")
