"""Runs whose ranks share an engine: what a sync holds in memory, and the command line with vLLM."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

from drpo_lightning.batch import Sampling
from drpo_lightning.rollout import TransformersEngine
from drpo_lightning.rollout.node import NodeEngine
from tests.rollout.conftest import MODEL
from tests.rollout.ranks import WORLD, Ranks

ROOT = Path(__file__).parents[2]


class Watched:
    """Weights of which it notes how many that it has given out are still held when the next is gathered."""

    def __init__(self, weights):
        self.weights = iter(weights)
        self.given, self.num_held = [], []

    def __iter__(self):
        return self

    def __next__(self):
        deadline = time.monotonic() + 1  # gloo's threads let go of what they have gathered a moment later
        while (held := sum(not given.expired() for given in self.given)) and time.monotonic() < deadline:
            time.sleep(1e-3)
        name, tensor = next(self.weights)
        self.num_held.append(held)
        self.given.append(StorageWeakRef(tensor.untyped_storage()))
        return name, tensor


class Streaming(TransformersEngine):
    """Lets go of a tensor before it asks for the next."""

    def load_weights(self, weights):
        for item in weights:
            super().load_weights([item])
            del item


def sharded_run(folder):
    """Two rollouts of a policy sharded by FSDP2; how many gathered tensors were held beside each, in each sync."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import ModelParallelStrategy

    from drpo_lightning.callbacks import FunctionReward, SyncProbe
    from drpo_lightning.datamodules import ArithmeticPrompts, RolloutDataModule
    from drpo_lightning.modules import PolicyModule
    from tests.conftest import scattered_reward

    watched = []

    class WatchedPolicy(PolicyModule):
        def named_weights(self):
            watched.append(Watched(super().named_weights()))
            return watched[-1]

    module = WatchedPolicy(MODEL, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3), temperature=1.5)
    data = RolloutDataModule(
        NodeEngine(Streaming()),
        ArithmeticPrompts(max_operand=9, num_validation=20),
        MODEL,
        num_prompts=2 * WORLD,
        group_size=4,
        num_updates=2,
        sampling=Sampling(max_tokens=4, temperature=1.5),
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=WORLD,
        strategy=ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1),
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        callbacks=[FunctionReward(scattered_reward, name="scattered"), SyncProbe()],
    )
    trainer.fit(module, data)
    return [weights.num_held for weights in watched], trainer.global_step


def test_of_a_sharded_policy_there_is_one_whole_tensor_at_a_time(tmp_path):
    num_weights = len(AutoModelForCausalLM.from_pretrained(MODEL).state_dict())
    ranks = Ranks(tmp_path)
    try:
        results = ranks(sharded_run, tmp_path, timeout_seconds=120)
    finally:
        ranks.close()
    assert results == [([[0] * num_weights] * 2, 4)] * WORLD


CONFIG = """
trainer: {devices: 2, accelerator: cpu, max_epochs: 2, check_val_every_n_epoch: 2, default_root_dir: .}
model: {model: MODEL}
data:
  num_prompts: 8
  engine:
    class_path: drpo_lightning.rollout.node.NodeEngine
    init_args:
      engine:
        class_path: drpo_lightning.rollout.VLLMEngine
        init_args: {dtype: float32, enforce_eager: true}
"""
WITNESS = """
from pathlib import Path

from lightning.pytorch import Callback

from drpo_lightning.rollout import RolloutHooks


class Witness(Callback, RolloutHooks):
    def on_rollout_end(self, trainer, pl_module, rollout):
        engine = trainer.datamodule.engine
        line = f"{len(rollout)} {engine.is_started} {engine.engine.is_started}\\n"
        with Path(f"rank{trainer.global_rank}").open("a") as file:
            file.write(line)
"""
FSDP2 = "{class_path: ModelParallelStrategy, init_args: {data_parallel_size: 2, tensor_parallel_size: 1}}"


@pytest.mark.parametrize("strategy", ["ddp", pytest.param(FSDP2, marks=pytest.mark.reliability)], ids=["ddp", "fsdp2"])
def test_two_ranks_of_a_run_share_one_vllm(tmp_path, strategy):
    (tmp_path / "witness.py").write_text(WITNESS)
    (tmp_path / "shared.yaml").write_text(CONFIG.replace("MODEL", MODEL))
    command = [sys.executable, "-m", "drpo_lightning", "fit", f"--config={ROOT}/configs/quickstart.yaml"]
    command += ["--config=shared.yaml", f"--trainer.strategy={strategy}", "--trainer.callbacks+=witness.Witness"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "rank0").read_text() == "32 True True\n" * 2
    assert (tmp_path / "rank1").read_text() == "32 True False\n" * 2
    events = EventAccumulator(str(tmp_path / "runs" / "quickstart" / "version_0"))
    events.Reload()
    assert [event.step for event in events.Scalars("sync/probe_logprob_diff")] == [0, 4]
    assert all(event.value < 1e-4 for event in events.Scalars("sync/probe_logprob_diff"))
    shift = {event.step: event.value for event in events.Scalars("policy_shift/abs_max")}
    assert shift[1] < 1e-4, "pi = mu on the weights that sampled"
    assert shift[5] < 1e-4
