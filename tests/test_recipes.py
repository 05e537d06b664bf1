"""The recipes of `configs/` run: their own settings, with a small model and small data in place of the large ones."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from drpo_lightning import cli

ROOT = Path(__file__).parent.parent


@pytest.fixture
def chat_model(tmp_path, model_folder):
    """The small model with a chat template."""
    folder = tmp_path / "chat-model"
    shutil.copytree(model_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data_sets(tmp_path):
    """Folders that `datasets` loads as it would the recipe's from the hub."""
    rows = {
        "train": [{"prompt": f"What is {n} + {n}?", "solution": str(2 * n), "source": "test"} for n in range(20)],
        "val": [{"problem": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(2)],
    }
    for name, content in rows.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("\n".join(map(json.dumps, content)))
    return tmp_path / "train", tmp_path / "val"


@pytest.fixture
def run(monkeypatch, tmp_path):
    def run(config, *arguments):
        small = [
            "--data.num_prompts=4",
            "--data.group_size=4",
            "--data.sampling.max_tokens=4",
            "--trainer.max_epochs=1",
        ]
        small += ["--data.engine=drpo_lightning.rollout.TransformersEngine", "--trainer.accelerator=cpu"]
        logs = [f"--trainer.default_root_dir={tmp_path}", f"--trainer.logger.init_args.save_dir={tmp_path}"]
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["drpo", "fit", f"--config=configs/{config}", *small, *logs, *arguments])
        cli.main()

    return run


def test_smollm2_arithmetic(run, chat_model, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("SMOLLM2", str(chat_model))
    run("smollm2_arithmetic.yaml", "--data.val_prompts.num_validation=4", "--trainer.accumulate_grad_batches=2")
    assert "4 updates on 1 rollouts" in capsys.readouterr().out
    assert (tmp_path / "smollm2_arithmetic" / "version_0" / "policy" / "model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_qwen3_math(run, chat_model, data_sets, capsys, tmp_path):
    train, val = data_sets
    run(
        "qwen3_math.yaml",
        f"--model.model={chat_model}",
        f"--data.prompts.name={train}",
        "--data.prompts.config=null",
        f"--data.val_prompts.name={val}",
        "--trainer.accumulate_grad_batches=2",
    )
    assert "4 updates on 1 rollouts" in capsys.readouterr().out
    assert (tmp_path / "qwen3_math" / "version_0" / "policy" / "model.safetensors").is_file()
