"""The configuration that a run leaves keeps `${oc.env:NAME}` where it stood, changes nothing else, and can be read."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from drpo_lightning import cli, saved_config, score
from drpo_lightning.callbacks import ExactMatchReward

ENVIRONMENT = {"KEY": "hunter2", "NAME": "drpo", "SPLIT": "train", "NUM": "2", "DIGIT": "5"}
"""Some of them are a part of class paths, numbers and other texts; a split is checked against what there is."""
CONFIG = """
vars:
  key: ${oc.env:KEY}
  header: Bearer ${vars.key}
  name: ${oc.env:NAME}
  digit: ${oc.env:DIGIT}
  unset: ${oc.env:NOT_SET,fallback}
  others: [Qwen2.5, drpo-run, hunter2000, trainer]
trainer:
  accelerator: cpu
  max_epochs: 1
  enable_progress_bar: false
  enable_checkpointing: false
  enable_model_summary: false
  num_sanity_val_steps: 0
  callbacks: [ExactMatchReward, RolloutStatistics]
model: {optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-06}}}
data:
  engine: TransformersEngine
  prompts: {class_path: ArithmeticPrompts, init_args: {split: "${oc.env:SPLIT}"}}
  num_prompts: ${oc.env:NUM}
  group_size: 4
  num_updates: 1
  sampling: {max_tokens: 4}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model_folder):
    """The log folder of a run by `drpo fit`."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "given.yaml").write_text(CONFIG)
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder)}}
    arguments = (f"--config={folder / 'given.yaml'}", f"--model.model={model_folder}")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.setattr(saved_config, "UNRESOLVED", {})
        patch.setattr(sys, "argv", ["drpo", "fit", *arguments, f"--trainer.logger={json.dumps(logger)}"])
        cli.main()
    return next(folder.rglob("config.yaml")).parent


@pytest.fixture
def saved(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


def test_interpolations_stay_and_texts_that_have_none_are_left_alone(saved, model_folder):
    assert saved["vars"] == {
        "key": "${oc.env:KEY}",
        "header": "Bearer ${oc.env:KEY}",
        "name": "${oc.env:NAME}",
        "digit": "${oc.env:DIGIT}",
        "unset": "fallback",
        "others": ["Qwen2.5", "drpo-run", "hunter2000", "trainer"],
    }
    assert saved["model"]["model"] == model_folder
    assert saved["data"]["prompts"]["init_args"]["split"] == "${oc.env:SPLIT}"
    assert saved["data"]["num_prompts"] == 2
    paths = [callback["class_path"] for callback in saved["trainer"]["callbacks"]]
    assert paths == ["drpo_lightning.callbacks.ExactMatchReward", "drpo_lightning.callbacks.RolloutStatistics"]
    assert saved["model"]["optimizer"]["init_args"]["lr"] == 1e-6


def test_a_class_path_stays_even_if_it_is_a_value_of_the_environment(monkeypatch):
    monkeypatch.setattr(saved_config, "UNRESOLVED", {"a.B": "${oc.env:NAME}"})
    settings = [{"class_path": "a.B", "init_args": {"text": "a.B"}}]
    expected = [{"class_path": "a.B", "init_args": {"text": "${oc.env:NAME}"}}]
    assert saved_config.unresolved(settings) == expected


def test_a_saved_configuration_scores(folder, monkeypatch, capsys):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "1+2=", "completion": "3", "answer": "3"}\n')
    score.main([f"--config={folder / 'config.yaml'}", f"--data={rows}"])
    assert "exact_match" in capsys.readouterr().out


def test_a_printed_configuration_scores(monkeypatch, capsys, tmp_path, model_folder):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "given.yaml").write_text(CONFIG)
    arguments = [f"--config={tmp_path / 'given.yaml'}", f"--model.model={model_folder}", "--print_config"]
    monkeypatch.setattr(sys, "argv", ["drpo", "fit", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    Path(tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    settings = score.read_settings([f"--config={tmp_path / 'printed.yaml'}"])
    assert [type(reward) for reward in settings.rewards] == [ExactMatchReward]


def test_what_is_applied_and_what_the_checkpoint_wins_with_are_said_apart():
    before = {
        "model": {
            "optimizer": {"class_path": "O", "init_args": {"lr": 1.0}},
            "lr_scheduler": None,
            "objective": {"class_path": "a.A", "init_args": {"delta": 1}},
        },
        "trainer": {"max_epochs": 1},
    }
    now = {
        "model": {
            "optimizer": {"class_path": "O", "init_args": {"lr": 2.0}},
            "lr_scheduler": {"class_path": "S", "init_args": {"step_size": 1}},
            "objective": {"class_path": "b.B"},
        },
        "trainer": {"max_epochs": 9},
        "ckpt_path": "last",
    }
    applied, ignored = saved_config.said_of_changes(before, now)
    assert applied.endswith(": model.lr_scheduler: None -> S; model.objective: a.A -> b.B")
    assert ignored.startswith("Not applied: model.optimizer.init_args.lr: 1.0 -> 2.0. ")
    assert ignored.endswith("for another one start a new run from the exported policy")
    assert list(saved_config.said_of_changes(now, now)) == []
