"""One of two ranks whose numbers break: `python -m tests.reliability.ranks_of_numbers RANK FOLDER`."""

import datetime
import os
import pickle
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import TorchElasticEnvironment

from drpo_lightning.batch import Sampling
from drpo_lightning.callbacks import FunctionReward
from drpo_lightning.datamodules import ArithmeticPrompts, RolloutDataModule
from drpo_lightning.modules import PolicyModule
from drpo_lightning.objectives import DRPO
from drpo_lightning.rollout import TransformersEngine
from tests.callbacks.conftest import MemoryLogger
from tests.conftest import MODEL_FOLDER, scattered_reward
from tests.distributed.training import NUM_RANKS, make_strategy
from tests.planted import Breaks, Plant, Recorder, SparingAdamW, adamw

PATIENCE = datetime.timedelta(seconds=60)
NUM_UPDATES = 6


class Case(NamedTuple):
    """A run of three rollouts of two updates, in which a number breaks on the second rank.

    Attributes:
        strategy: `ddp`, `fsdp2` or `fsdp1`.
        quantity: what breaks, see `Plant`; None leaves the updates out by the optimizer itself.
        updates: in which updates.
        lie: whether the second rank's engine lies in the second rollout instead.
    """

    strategy: str
    quantity: str | None = None
    updates: tuple[int, ...] = (3,)
    lie: bool = False

    def __str__(self):
        return f"{self.strategy}-{self.quantity}-{self.updates}-{self.lie}"


class Answer(NamedTuple):
    """What a rank has to say of a case.

    Attributes:
        error: type and message of what ended the run.
        states: this rank's weights and what the optimizer remembers, by updates completed.
        skipped: `optim/skipped_updates`, as logged.
        warnings: messages.
        samples: of this rank that were broken, by update.
        files: content of the files of samples by name.
    """

    error: tuple[str, str] | None
    states: dict[int, list[torch.Tensor]]
    skipped: list[float]
    warnings: list[str]
    samples: dict[int, int]
    files: dict[str, str]


class LyingEngine(TransformersEngine):
    """Claims that its very last token has a probability of 2, in the second rollout."""

    num_rollouts = 0

    def generate(self, *arguments, **settings):
        groups = super().generate(*arguments, **settings)
        self.num_rollouts += 1
        if self.num_rollouts == 2:
            sample = groups[-1][-1]
            groups[-1][-1] = replace(sample, logprobs=[*sample.logprobs[:-1], 0.693])
        return groups


def run(case, rank, folder):
    plant = Plant(case.quantity, updates=case.updates, row=1, rank=1)
    recorder, logger = Recorder(), MemoryLogger()
    module = PolicyModule(
        str(MODEL_FOLDER),
        objective=Breaks(plant) if case.quantity == "objective_loss" else DRPO(),
        optimizer=adamw if case.quantity else lambda parameters: SparingAdamW(parameters, updates=case.updates),
        temperature=1.5,
        max_skipped_updates=2,
    )
    data = RolloutDataModule(
        LyingEngine() if case.lie and rank == 1 else TransformersEngine(),
        ArithmeticPrompts(max_operand=9, num_validation=20),
        str(MODEL_FOLDER),
        num_prompts=4,
        group_size=4,
        num_updates=2,
        sampling=Sampling(max_tokens=4, temperature=1.5),
    )
    callbacks = [FunctionReward(scattered_reward, name="scattered"), recorder]
    trainer = Trainer(
        accelerator="cpu",
        devices=NUM_RANKS,
        strategy=make_strategy(case.strategy),
        plugins=[TorchElasticEnvironment()],
        max_epochs=NUM_UPDATES // 2,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        logger=logger,
        callbacks=[*callbacks, plant] if case.quantity else callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder / str(case),
    )
    error = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(module, data)
        except Exception as raised:  # noqa: BLE001 - it is the test's to judge
            error = (type(raised).__name__, str(raised))
    files = {path.name: path.read_text() for path in (folder / str(case)).rglob(f"*.rank{rank}.jsonl")}
    messages = [str(warning.message) for warning in caught]
    return Answer(error, recorder.states, logger.values("optim/skipped_updates"), messages, plant.samples, files)


def main(rank, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(NUM_RANKS), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    answers = {}
    for case in pickle.loads((folder / "cases.pickle").read_bytes()):
        store = dist.FileStore(str(folder / f"{case}.store"), NUM_RANKS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS, timeout=PATIENCE)
        try:
            answers[case] = run(case, rank, folder)
        finally:
            dist.destroy_process_group()
        print(rank, case, answers[case].error, flush=True)  # noqa: T201
    (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(answers))


if __name__ == "__main__":
    # Under its own name, which the pickles of the test have.
    from tests.reliability.ranks_of_numbers import main as run_rank

    run_rank(int(sys.argv[1]), Path(sys.argv[2]))
