"""An exported policy says what it was trained on and how, and nothing of the machine."""

import json
import os

import pytest
import torch
import yaml

from drpo_lightning import __version__, saved_config
from drpo_lightning.callbacks import AdaptiveDelta, ExportPolicy
from drpo_lightning.datamodules import ArithmeticPrompts, HubPrompts, MixedPrompts, ReasoningGymPrompts
from drpo_lightning.export import export_checkpoint
from drpo_lightning.model_card import described, model_card, public_name, write_card
from drpo_lightning.modules import LoRA
from drpo_lightning.objectives import DRPO, ClippedRatio, Decoupled

VAL_PROMPTS = ArithmeticPrompts("validation", max_operand=9, num_validation=20)


def read(folder):
    """Record, front matter and text of a folder's card."""
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return json.loads((folder / "training.json").read_text()), yaml.safe_load(front), text


@pytest.fixture
def run(make_run, tmp_path):
    """A run that validates, exports and keeps a checkpoint."""
    made = make_run(
        ExportPolicy(folder=str(tmp_path / "out")),
        trainer={"num_sanity_val_steps": -1, "max_epochs": 2, "check_val_every_n_epoch": 2},
        module={"objective": DRPO(delta=0.2)},
        data={"val_prompts": VAL_PROMPTS, "val_num_samples": 2},
    )
    made.fit()
    return made


def test_the_record_has_what_the_run_had(run, tmp_path):
    record, _, _ = read(tmp_path / "out")
    assert record["base_model"] == "arithmetic"
    assert record["objective"] == {
        "class": "DRPO",
        "delta": 0.2,
        "scale_by_advantage": True,
        "description": DRPO(delta=0.2).describe(),
    }
    assert (record["updates"], record["rollouts"]) == (4, 2)
    settings = record["settings"]
    assert settings["optimizer"] == {"class": "AdamW", "lr": 1e-3, "weight_decay": 0.01, "betas": [0.9, 0.999]}
    assert {name: settings[name] for name in ("num_prompts", "group_size", "num_updates", "seed", "precision")} == {
        "num_prompts": 4,
        "group_size": 4,
        "num_updates": 2,
        "seed": 0,
        "precision": "32-true",
    }
    assert settings["engine"] == {"class": "TransformersEngine", "dtype": "float32"}
    assert record["rewards"] == [{"name": "scattered", "class": "FunctionReward", "weight": 1.0}]
    assert record["prompts"]["class"] == "ArithmeticPrompts"
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["drpo-lightning"] == __version__


def test_the_validation_is_the_latest_and_says_when_it_was(run, tmp_path):
    record, _, text = read(tmp_path / "out")
    figures = {k: round(float(v), 6) for k, v in run.trainer.callback_metrics.items() if k.startswith("val/")}
    assert record["validation"] == {"after_updates": 4, "figures": figures}
    assert "## Validation after 4 updates" in text
    assert f"| val/reward/mean | {figures['val/reward/mean']:.4g} |" in text


def test_nothing_of_the_machine_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setenv("A_SECRET", "hunter2")
    written = "".join((tmp_path / "out" / name).read_text() for name in ("README.md", "training.json"))
    for word in (str(tmp_path), os.getcwd(), os.sep + "models", "hunter2", os.uname().nodename + ".", "/home", "/root"):
        assert word not in written


def test_an_export_of_a_checkpoint_says_the_same(run, tmp_path):
    run.trainer.save_checkpoint(tmp_path / "run.ckpt")
    export_checkpoint(tmp_path / "run.ckpt", tmp_path / "exported")
    for name in ("README.md", "training.json"):
        assert (tmp_path / "exported" / name).read_text() == (tmp_path / "out" / name).read_text()


def test_a_checkpoint_without_a_record_gives_model_and_length(make_run, tmp_path):
    made = make_run()
    made.fit()
    made.trainer.save_checkpoint(tmp_path / "run.ckpt")
    export_checkpoint(tmp_path / "run.ckpt", tmp_path / "out")
    record, front, text = read(tmp_path / "out")
    assert record == {"base_model": "arithmetic", "updates": 2}
    assert "base_model" not in front
    assert "2 updates." in text


def test_settings_that_changed_on_the_way_are_said_after_every_resume(make_run, tmp_path):
    stretches = [(1, DRPO(delta=0.2)), (2, DRPO(delta=12.5)), (3, DRPO(delta=12.5)), (4, ClippedRatio())]
    for max_epochs, objective in stretches:
        exported = ExportPolicy(folder=str(tmp_path / "out"))
        run = make_run(exported, trainer={"max_epochs": max_epochs}, module={"objective": objective})
        run.fit(ckpt_path=tmp_path / "run.ckpt" if max_epochs > 1 else None)
        run.trainer.save_checkpoint(tmp_path / "run.ckpt")
    record, _, text = read(tmp_path / "out")
    assert record["changes"] == [
        {"from_update": 2, "settings": {"objective.delta": [0.2, 12.5]}},
        {"from_update": 6, "settings": {"objective": ["DRPO", "ClippedRatio"]}},
    ]
    assert "- From update 2 on: objective.delta: 0.2 -> 12.5\n- From update 6 on: objective: DRPO -> Clip" in text
    export_checkpoint(tmp_path / "run.ckpt", tmp_path / "exported")
    assert read(tmp_path / "exported")[0] == record


def test_a_delta_that_a_callback_restores_is_no_change(make_run, tmp_path):
    for max_epochs in (1, 2):
        callbacks = [ExportPolicy(folder=str(tmp_path / "out")), AdaptiveDelta(gain=1.0)]
        run = make_run(*callbacks, trainer={"max_epochs": max_epochs}, module={"objective": DRPO(delta=0.2)})
        run.fit(ckpt_path=tmp_path / "run.ckpt" if max_epochs > 1 else None)
        run.trainer.save_checkpoint(tmp_path / "run.ckpt")
        if max_epochs == 1:
            assert run.module.objective.delta != 0.2
    assert "changes" not in read(tmp_path / "out")[0]


def test_adapters_are_peft_s(make_run, tmp_path):
    make_run(ExportPolicy(folder=str(tmp_path / "out"), adapter=True), module={"peft": LoRA(r=2)}).fit()
    record, front, text = read(tmp_path / "out")
    assert front["library_name"] == "peft"
    assert record["settings"]["peft"]["r"] == 2
    assert "LoRA adapters of `arithmetic`" in text


def test_the_front_matter_names_what_is_on_the_hub():
    prompts = MixedPrompts({"a": HubPrompts("openai/gsm8k", config="main"), "b": ArithmeticPrompts()})
    record = {"base_model": "Qwen/Qwen3-0.6B", "prompts": described(prompts)}
    front = yaml.safe_load(model_card(record).split("---\n")[1])
    assert front["base_model"] == "Qwen/Qwen3-0.6B"
    assert front["datasets"] == ["openai/gsm8k"]
    assert front["library_name"] == "transformers"


def test_a_card_that_somebody_has_written_stays_and_ours_is_written_anew(tmp_path):
    record = {"base_model": "a/b", "updates": 1}
    write_card(tmp_path, record)
    write_card(tmp_path, record | {"updates": 2})
    assert "2 updates" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("# Mine")
    write_card(tmp_path, record | {"updates": 3})
    assert (tmp_path / "README.md").read_text() == "# Mine"
    assert json.loads((tmp_path / "training.json").read_text())["updates"] == 3


def test_of_a_path_only_the_last_part_is_said(model_folder, tmp_path):
    assert public_name(model_folder) == "arithmetic"
    assert public_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert described(HubPrompts(str(tmp_path)))["name"] == tmp_path.name


class Elsewhere(HubPrompts):
    """A data set that takes a key."""

    def __init__(self, token):
        super().__init__("owner/name")
        self.header = f"Bearer {token}"


def test_of_a_class_that_is_not_ours_the_name_alone_is_said():
    assert described(MixedPrompts({"a": Elsewhere("hunter2")})) == {
        "class": "MixedPrompts",
        "data_sets": {"a": {"class": "Elsewhere"}},
    }


def test_a_value_of_the_environment_is_said_by_its_name(monkeypatch):
    monkeypatch.setattr(saved_config, "UNRESOLVED", {"key hunter2": "key ${oc.env:A_SECRET}"})
    assert described(HubPrompts("owner/name", suffix="key hunter2"))["suffix"] == "key ${oc.env:A_SECRET}"


def test_a_text_that_is_no_place_stays_whole():
    assert described(HubPrompts("owner/name", suffix="/no_think"))["suffix"] == "/no_think"
    assert described(ReasoningGymPrompts("chain_sum", 3, suffix="/"))["suffix"] == "/"


def test_an_objective_in_another_is_described_with_it():
    assert described(Decoupled(ClippedRatio(clip_low=0.1)))["objective"]["clip_low"] == 0.1


def test_a_cell_keeps_what_it_holds():
    card = model_card({"base_model": "a/b", "prompts": {"class": "X", "suffix": "a|b\nc"}})
    assert "| suffix | a\\|b c |" in card
