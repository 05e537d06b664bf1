"""What all tests share. Shapes and types of the lower floors are checked in every test."""

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # of what Lightning calls

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")

# An int is a float, as in every annotation of Python.
install_import_hook(
    ["drpo_lightning.functional", "drpo_lightning.objectives", "drpo_lightning.metrics", "drpo_lightning.batch"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

MODEL_FOLDER = Path(__file__).parents[1] / "models" / "arithmetic"


@pytest.fixture(autouse=True)
def environment_is_restored():
    """Undoes what Lightning sets for a run, such as the port that its ranks meet at, and what vLLM reads."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def own_modules_end_with_their_test(tmp_path_factory):
    """Forgets modules that were imported from a temporary folder: another test's may have the same name."""
    yield
    temporary = str(tmp_path_factory.getbasetemp())
    for name, module in sys.modules.copy().items():
        if (getattr(module, "__file__", None) or "").startswith(temporary):
            del sys.modules[name]


@pytest.fixture(autouse=True)
def process_group_ends_with_its_test():
    """Ends what a sharded run in this process leaves behind: Lightning would take later runs for distributed ones."""
    import torch.distributed as dist

    before = dist.is_initialized()
    yield
    if dist.is_initialized() and not before:
        dist.destroy_process_group()


class Run(NamedTuple):
    trainer: Any
    module: Any
    data: Any

    def fit(self, **arguments):
        self.trainer.fit(self.module, self.data, **arguments)


def scattered_reward(completion_ids, **_):
    """0, 0.25, ..., 1: the samples of a prompt differ, whatever the model has learned."""
    return [sum(i * token for i, token in enumerate(ids, start=1)) % 5 / 4 for ids in completion_ids]


@pytest.fixture(scope="session")
def model_folder():
    """The small model that adds numbers."""
    return str(MODEL_FOLDER)


@pytest.fixture
def make_run(tmp_path):
    """Makes a small real run on the CPU: by default 4 prompts x 4 samples in 2 updates, with a reward that varies."""
    import torch
    from lightning.pytorch import Trainer

    from drpo_lightning.batch import Sampling
    from drpo_lightning.callbacks import FunctionReward
    from drpo_lightning.datamodules import ArithmeticPrompts, RolloutDataModule
    from drpo_lightning.modules import PolicyModule
    from drpo_lightning.rollout import TransformersEngine

    def make(*callbacks, trainer=None, module=None, data=None, rewards=None):
        module = {
            "model": str(MODEL_FOLDER),
            "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
            "temperature": 1.5,
        } | (module or {})
        data = {
            "engine": TransformersEngine(),
            "prompts": ArithmeticPrompts(max_operand=9, num_validation=20),
            "model": str(MODEL_FOLDER),
            "num_prompts": 4,
            "group_size": 4,
            "num_updates": 2,
            "sampling": Sampling(max_tokens=4, temperature=1.5),
        } | (data or {})
        trainer = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "log_every_n_steps": 1,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "default_root_dir": tmp_path,
        } | (trainer or {})
        rewards = [FunctionReward(scattered_reward, name="scattered")] if rewards is None else rewards
        return Run(
            Trainer(callbacks=[*rewards, *callbacks], **trainer), PolicyModule(**module), RolloutDataModule(**data)
        )

    return make


@pytest.fixture
def make_recorder():
    """Makes a callback that keeps the rollouts and micro-batches it sees, and may do something after a micro-batch."""
    from lightning.pytorch import Callback

    from drpo_lightning.rollout import RolloutHooks

    class Recorder(Callback, RolloutHooks):
        def __init__(self, after_batch=None):
            self.after_batch = after_batch
            self.events = []
            self.rollouts = []
            self.batches = []
            """Micro-batches, a list per epoch."""
            self.outputs = []

        def on_rollout_start(self, trainer, pl_module):
            self.events.append("start")

        def on_engine_refresh(self, trainer, pl_module, engine):
            self.events.append("refresh")

        def on_rollout_end(self, trainer, pl_module, rollout):
            self.events.append("end")
            self.rollouts.append(rollout)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.batches += [[] for _ in range(len(self.batches), trainer.current_epoch + 1)]
            self.batches[-1].append(batch)
            self.outputs.append(outputs)
            if self.after_batch is not None:
                self.after_batch(trainer, pl_module, batch_idx)

    return Recorder
