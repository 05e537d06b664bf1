"""Training as a whole: it learns, it resumes exactly, and it does not depend on how an update is split."""

import csv
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from drpo_lightning.batch import Sampling
from drpo_lightning.callbacks import ExactMatchReward, PolicyCheckpoint
from drpo_lightning.datamodules import ArithmeticPrompts
from drpo_lightning.objectives import DPPO, DRPO, ClippedRatio, Unregularized

ROOT = Path(__file__).parent.parent


def weights(run):
    return {name: tensor.clone() for name, tensor in run.module.named_weights()}


def assert_equal_weights(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize(
    "objective", [DRPO(0.2), DRPO(12.5), DPPO(), ClippedRatio(), Unregularized()], ids=lambda o: type(o).__name__
)
def test_every_objective_learns_to_add(make_run, make_recorder, objective):
    recorder = make_recorder()
    run = make_run(
        recorder,
        rewards=[ExactMatchReward()],
        trainer={"max_epochs": 12, "gradient_clip_val": 1.0},
        module={
            "objective": objective,
            "temperature": 1.0,
            "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
        },
        data={
            "prompts": ArithmeticPrompts(),
            "num_prompts": 64,
            "group_size": 8,
            "num_updates": 4,
            "sampling": Sampling(max_tokens=8),
        },
    )
    run.fit()
    rewards = [rollout.rewards.mean().item() for rollout in recorder.rollouts]
    assert sum(rewards[-2:]) / 2 > rewards[0] + 0.15, rewards


@pytest.mark.parametrize("stop_after_step", [3, 4, 5], ids=["mid-rollout", "between rollouts", "first update"])
def test_a_resumed_run_equals_one_that_was_never_stopped(make_run, tmp_path, stop_after_step):
    whole = make_run(trainer={"max_epochs": 4})
    whole.fit()

    def stopped(folder):
        checkpoint = ModelCheckpoint(
            dirpath=folder, filename="at-{step}", every_n_train_steps=stop_after_step, save_top_k=-1
        )
        return make_run(checkpoint, trainer={"max_epochs": 4, "enable_checkpointing": True})

    stopped(tmp_path).fit()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*exists and is not empty")
        resumed = stopped(tmp_path)
        resumed.fit(ckpt_path=tmp_path / f"at-step={stop_after_step}.ckpt")
    assert resumed.trainer.global_step == whole.trainer.global_step == 8
    assert_equal_weights(weights(resumed), weights(whole))


class InterruptOnce(Callback):
    """Ctrl-C in the middle of a training step."""

    def __init__(self, step):
        self.step = step

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [0, 2, 3], ids=["first step", "first step of a rollout", "mid-rollout"])
def test_a_run_interrupted_inside_a_step_resumes_with_that_step(make_run, tmp_path, step):
    whole = make_run(trainer={"max_epochs": 3})
    whole.fit()
    trainer = {"max_epochs": 3, "enable_checkpointing": True}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*exists and is not empty")
        with pytest.raises(SystemExit):
            make_run(InterruptOnce(step), PolicyCheckpoint(dirpath=tmp_path), trainer=trainer).fit()
        if step == 0:
            assert not (tmp_path / "last.ckpt").exists(), "nothing was trained yet"
            return
        resumed = make_run(PolicyCheckpoint(dirpath=tmp_path), trainer=trainer)
        resumed.fit(ckpt_path=tmp_path / "last.ckpt")
    assert resumed.trainer.global_step == whole.trainer.global_step == 6
    assert_equal_weights(weights(resumed), weights(whole))


def test_two_runs_with_one_seed_are_equal_and_another_seed_differs(make_run):
    first, again, other = (make_run(data={"seed": seed}) for seed in (1, 1, 2))
    for run in (first, again, other):
        run.fit()
    assert_equal_weights(weights(first), weights(again))
    assert not torch.equal(weights(first)["model.norm.weight"], weights(other)["model.norm.weight"])


NOT_COMPARED = ("perf/", "proxy/", "drift/", "entropy/mean", "entropy/p", "entropy/max")


def logged(folder, *arguments):
    """Metrics of a run of the quickstart on transformers, by name and step.

    Not times, and not what is measured on a few completions of each rank: other ranks, other completions.
    """
    command = [sys.executable, "-m", "drpo_lightning", "fit", "--config=configs/quickstart.yaml"]
    command += ["--data.engine=drpo_lightning.rollout.TransformersEngine", "--trainer.accelerator=cpu"]
    command += ["--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={folder}", "--trainer.max_epochs=2"]
    command += [f"--trainer.default_root_dir={folder}", "--trainer.enable_progress_bar=false", *arguments]
    result = subprocess.run(command, cwd=ROOT, check=False, timeout=400, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    with next(folder.glob("**/metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    return {
        (name, int(row["step"])): float(value)
        for row in rows
        for name, value in row.items()
        if value and name not in ("step", "epoch") and not name.startswith(NOT_COMPARED)
    }


FSDP1 = "{class_path: tests.distributed.strategies.CPUFSDPStrategy, init_args: {state_dict_type: sharded}}"
FSDP2 = "{class_path: ModelParallelStrategy, init_args: {data_parallel_size: 2, tensor_parallel_size: 1}}"


def test_ranks_and_micro_batches_change_nothing(tmp_path):
    # Seeds belong to the prompts, of the sampling and of the split into updates: only the order of a sum differs.
    settings = ["--data.num_prompts=16", "--trainer.limit_val_batches=0"]
    two = [*settings, "--trainer.devices=2"]
    runs = {
        "whole": settings,
        "ddp": [*two, "--trainer.strategy=ddp"],
        "fsdp2": [*two, f"--trainer.strategy={FSDP2}", "--trainer.accumulate_grad_batches=2"],
    }
    assert_equal_logs(tmp_path, runs, {"optim/loss", "optim/grad_norm", "divergence/k3_kl", "grad_weight/mean"})


@pytest.mark.reliability
def test_adapters_and_a_reference_do_not_depend_on_ranks(tmp_path):
    settings = ["--model.peft.r=4", "--model.reference.beta=0.1", "--data.num_prompts=16", "--data.num_updates=2"]
    settings += ["--trainer.callbacks+=ReferenceDivergence", "--model.optimizer.lr=1e-3"]
    settings += ["--trainer.max_epochs=1", "--trainer.limit_val_batches=0"]
    two = [*settings, "--trainer.devices=2"]
    runs = {
        "whole": settings,
        "ddp": [*two, "--trainer.strategy=ddp"],
        "fsdp1": [*two, f"--trainer.strategy={FSDP1}"],
    }
    assert_equal_logs(tmp_path, runs, {"optim/reference_penalty", "reference/k3_kl", "optim/grad_norm"})


def assert_equal_logs(tmp_path, runs, expected):
    """Each run logs what the one named "whole" does, and that holds the expected names."""
    metrics = {}
    for name, arguments in runs.items():
        (tmp_path / name).mkdir()
        metrics[name] = logged(tmp_path / name, *arguments)
    whole = metrics.pop("whole")
    assert expected <= {name for name, _ in whole}
    for name, other in metrics.items():
        assert other.keys() == whole.keys(), name
        for key in whole:
            assert other[key] == pytest.approx(whole[key], rel=2e-3, abs=2e-5), (name, key)
