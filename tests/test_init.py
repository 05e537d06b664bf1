"""Configurations of `drpo init` parse and build, for every task and machine, and are what they say."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from drpo_lightning import cli, init
from drpo_lightning.callbacks import RolloutProgress
from drpo_lightning.datamodules.micro_batches import check_batch_sizes
from drpo_lightning.errors import SettingError
from drpo_lightning.init import TASKS, configuration

ROOT = Path(__file__).parents[1]
MODEL = str(ROOT / "models" / "arithmetic")


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("lora", [False, True])
def test_every_task_builds(task, lora, tmp_path, monkeypatch):
    built = []
    monkeypatch.setattr(cli.DRPOCommandLine, "_run_subcommand", lambda command, subcommand: built.append(command))
    path = tmp_path / "mine.yaml"
    path.write_text(configuration(model=MODEL, task=task, lora=lora, path=str(path)))
    monkeypatch.setattr(sys, "argv", ["drpo", "fit", f"--config={path}"])
    cli.main()
    (command,) = built
    assert (command.model.peft is not None) == lora
    assert any(isinstance(callback, RolloutProgress) for callback in command.trainer.callbacks)


def test_a_model_in_a_folder_gets_prompts_that_it_can_take():
    config = yaml.safe_load(configuration(model=MODEL, task="math").replace("${seed_everything}", "0"))
    assert config["data"]["prompt_format"] == "raw"
    assert config["data"]["sampling"]["max_tokens"] == 256
    elsewhere = yaml.safe_load(configuration(model="Qwen/Qwen3-4B", task="math").replace("${seed_everything}", "0"))
    assert (elsewhere["data"]["prompt_format"], elsewhere["data"]["sampling"]["max_tokens"]) == ("chat", 8192)


@pytest.mark.parametrize("name", ["my data, v1.jsonl", "C: #1.jsonl", "it's {one}.jsonl"])
def test_any_name_is_read_back_as_it_is(name):
    text = configuration(model=f"models/{name}", task="file", data=name, path=f"{name}.yaml")
    config = yaml.safe_load(text.replace("${seed_everything}", "0"))
    assert config["data"]["prompts"]["init_args"]["source"]["init_args"]["path"] == name
    assert config["model"]["model"] == f"models/{name}"
    assert config["trainer"]["default_root_dir"].startswith("runs/")


@pytest.mark.parametrize("gpus", [0, 1, 2, 3, 5, 8, 24, 64])
def test_sizes_fit_any_number_of_gpus(gpus):
    config = yaml.safe_load(configuration(model="m", task="math", gpus=gpus).replace("${seed_everything}", "0"))
    trainer, data = config["trainer"], config["data"]
    assert trainer["devices"] == max(gpus, 1)
    check_batch_sizes(
        num_prompts=data["num_prompts"],
        group_size=data["group_size"],
        num_updates=data["num_updates"],
        window=trainer["accumulate_grad_batches"],
        num_ranks=max(gpus, 1),
    )
    assert ("strategy" in trainer) == (gpus > 1)
    assert trainer["accelerator"] == ("gpu" if gpus else "cpu")


def test_the_command_writes_what_trains(tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "drpo_lightning", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)

    made = run("init", "--model", MODEL, "--task", "arithmetic", "--gpus", "0", "--out", "mine.yaml")
    assert made.returncode == 0, made.stderr
    again = run("init", "--model", MODEL, "--task", "arithmetic", "--out", "mine.yaml")
    assert again.returncode == 2
    assert "`--out` 'mine.yaml' exists" in again.stderr
    small = ["--trainer.max_epochs=1", "--data.num_prompts=4", "--data.group_size=4", "--data.num_updates=1"]
    small += ["--trainer.accumulate_grad_batches=1", "--trainer.limit_val_batches=0"]
    trained = run("fit", "--config", "mine.yaml", "--data.engine=TransformersEngine", *small)
    assert trained.returncode == 0, trained.stderr
    assert "1 updates on 1 rollouts" in trained.stdout
    assert not [noise for noise in ("litlogger", "eval mode", "LeafSpec", "\r") if noise in trained.stderr]
    assert (tmp_path / "runs" / "mine" / "version_0" / "policy" / "config.json").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"task": "chess"}, r"`--task` must be one of .*'chess'"), ({"gpus": -1}, r"`--gpus` must be 0 .* got -1")],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        configuration(**{"model": "m", "task": "math"} | settings)


def test_the_command_says_which_folder_is_missing(capsys):
    with pytest.raises(SystemExit):
        init.main(["--model", "m", "--task", "math", "--gpus", "0", "--out", "nowhere/at/all.yaml"])
    assert "there is no folder 'nowhere/at'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "is_said"), [(["file"], True), (["file", "--data=my.jsonl"], False), (["arithmetic"], False)]
)
def test_a_file_that_is_assumed_is_said(tmp_path, capsys, arguments, is_said):
    init.main(["--model", MODEL, "--gpus=0", "--out", str(tmp_path / "mine.yaml"), "--task", *arguments])
    assert ("It takes its prompts from prompts.jsonl, since there is no `--data`" in capsys.readouterr().out) == is_said
