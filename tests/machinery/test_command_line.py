"""Lightning's machinery on the command line, on two ranks too; the tests that `docs/lightning.md` names exist."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.machinery.conftest import SMALL, scalars_of_csv

ROOT = Path(__file__).parents[2]
DOCUMENTATION = (ROOT / "docs" / "lightning.md").read_text()


def test_fast_dev_run_on_the_command_line_leaves_no_files(drpo, tmp_path, capsys):
    drpo("fit", "--trainer.fast_dev_run=true")
    printed = capsys.readouterr().out
    assert "1 updates on 1 rollouts" in printed
    assert re.search(r"^held-out reward: \d\.\d{3} after$", printed, re.MULTILINE), "nothing was validated before"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_validate_on_the_command_line_prints_a_table(drpo, capsys):
    drpo("validate")
    assert re.search(r"^ *all +\d+ +0\.\d+", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.reliability
def test_two_ranks_with_lightnings_defaults_train_as_one(drpo, tmp_path):
    """No sampler of Lightning's reshuffles, one decision to stop, one checkpoint."""
    callbacks = "[ExactMatchReward, PolicyShift, RolloutStatistics, PolicyCheckpoint, {class_path: EarlyStopping, "
    callbacks += "init_args: {monitor: val/reward/mean, min_delta: 10, patience: 1}}]"
    arguments = ["--trainer.max_epochs=9", "--trainer.check_val_every_n_epoch=1", f"--trainer.callbacks={callbacks}"]
    arguments += ["--trainer.use_distributed_sampler=true", "--trainer.logger=CSVLogger"]
    one, two = tmp_path / "one", tmp_path / "two"
    drpo("fit", *arguments, f"--trainer.default_root_dir={one}", logger=f"--trainer.logger.save_dir={one}")
    command = [sys.executable, "-m", "drpo_lightning", "fit", *SMALL, *arguments, f"--trainer.default_root_dir={two}"]
    command += [f"--trainer.logger.save_dir={two}", "--trainer.devices=2", "--trainer.strategy=ddp"]
    result = subprocess.run(command, cwd=ROOT, check=False, timeout=300, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = [scalars_of_csv(folder) for folder in (one, two)]
    for name in ("reward/mean", "val/reward/mean", "optim/loss", "policy_shift/abs_mean"):
        assert max(metrics[0][name])[0] <= 2, "stopped after two rollouts"
        assert metrics[1][name] == [(step, pytest.approx(v, rel=2e-3, abs=2e-5)) for step, v in metrics[0][name]], name
    assert [len(list(folder.rglob("last.ckpt"))) for folder in (one, two)] == [1, 1]


@pytest.mark.parametrize(("file", "name"), sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", DOCUMENTATION))))
def test_a_test_that_the_page_names_exists(file, name):
    names = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert name in names
