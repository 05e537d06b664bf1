"""The last lines of a run: before and after, and where everything is."""

import re

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from drpo_lightning.callbacks import ExportPolicy, RunSummary
from drpo_lightning.datamodules import ArithmeticPrompts

VALIDATION = {"val_prompts": ArithmeticPrompts("validation", max_operand=9, num_validation=20), "val_num_samples": 2}


def printed(capsys):
    return capsys.readouterr().out.strip().splitlines()


def test_before_and_after_are_the_first_and_the_last_validation(make_run, make_memory, capsys):
    logger = make_memory()
    make_run(
        RunSummary(), trainer={"logger": logger, "max_epochs": 3, "num_sanity_val_steps": -1}, data=VALIDATION
    ).fit()
    rewards, passes = logger.values("val/reward/mean"), logger.values("val/pass@1")
    assert len(rewards) == 4
    lines = printed(capsys)
    assert "6 updates on 3 rollouts" in lines
    for label, values in (("reward", rewards), ("pass@1", passes)):
        (line,) = (line for line in lines if line.startswith(f"held-out {label}: "))
        before, after = re.fullmatch(r".*: (\d\.\d{3}) before -> (\d\.\d{3}) after", line).groups()
        assert (float(before), float(after)) == pytest.approx((values[0], values[-1]), abs=6e-4)
    assert rewards[0] != rewards[-1]


def test_folders_are_named(make_run, tmp_path, capsys):
    logger = TensorBoardLogger(tmp_path, name="run", default_hp_metric=False)
    make_run(ExportPolicy(), RunSummary(), trainer={"logger": logger}).fit()
    assert printed(capsys) == [
        "2 updates on 1 rollouts",
        f"logs:    {logger.log_dir}",
        f"policy:  {logger.log_dir}/policy",
        f"look at: tensorboard --logdir '{tmp_path}/run'",
    ]


def test_without_validation_there_is_no_line_of_it(make_run, capsys):
    make_run(RunSummary()).fit()
    assert not any("held-out" in line for line in printed(capsys))
