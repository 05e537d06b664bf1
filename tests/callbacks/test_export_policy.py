"""The exported policy loads in transformers with the trained weights, and a damaged export is noticed."""

import json

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from drpo_lightning.callbacks import ExportPolicy
from drpo_lightning.datamodules import ArithmeticPrompts
from drpo_lightning.rollout import RolloutHooks


def loaded(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, **settings).state_dict()


def test_the_exported_folder_loads_with_the_trained_weights(make_run, model_folder, tmp_path):
    export = ExportPolicy(folder=str(tmp_path / "out"))
    run = make_run(export)
    run.fit()
    assert export.exported == tmp_path / "out"
    trained, exported, before = dict(run.module.named_weights()), loaded(export.exported), loaded(model_folder)
    assert exported.keys() == trained.keys() == before.keys()
    assert all(torch.equal(exported[name], trained[name]) for name in trained)
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}
    assert not torch.equal(exported["lm_head.weight"], before["lm_head.weight"])


def test_the_exported_tokenizer_and_generation_are_those_of_the_model(make_run, model_folder, tmp_path):
    make_run(ExportPolicy(folder=str(tmp_path / "out"))).fit()
    ours, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", model_folder))
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours("12+34=").input_ids == theirs("12+34=").input_ids
    assert ours.eos_token_id == theirs.eos_token_id
    ours, theirs = (
        json.loads((folder / "generation_config.json").read_text()) for folder in (tmp_path / "out", tmp_path / "out")
    )
    assert ours["eos_token_id"] == theirs["eos_token_id"] == 1


def test_a_tied_head_is_written_once(make_run, tmp_path):
    make_run(ExportPolicy(folder=str(tmp_path / "out"))).fit()
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert ("lm_head.weight" in names) != ("model.embed_tokens.weight" in names)


def test_the_precision_is_a_setting(make_run, tmp_path):
    run = make_run(ExportPolicy(folder=str(tmp_path / "out"), dtype="bfloat16"))
    run.fit()
    written, trained = load_file(tmp_path / "out" / "model.safetensors"), dict(run.module.named_weights())
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert all(torch.equal(written[name], trained[name].bfloat16()) for name in written)


def test_a_precision_that_is_not_exported_is_refused_before_the_run():
    with pytest.raises(ValueError, match=r"`dtype` must be one of .*, got 'bfloat61'"):
        ExportPolicy(dtype="bfloat61")


def test_the_configuration_says_the_precision(make_run, tmp_path):
    make_run(ExportPolicy(folder=str(tmp_path / "out"), dtype="bfloat16")).fit()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in loaded(tmp_path / "out", dtype="auto").values()} == {torch.bfloat16}


def test_by_default_it_stands_in_the_log_folder(make_run, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="run", default_hp_metric=False)
    export = ExportPolicy()
    make_run(export, trainer={"logger": logger}).fit()
    assert str(export.exported) == f"{logger.log_dir}/policy"
    export = ExportPolicy()
    make_run(export).fit()
    assert export.exported == tmp_path / "policy"


class Damage(Callback, RolloutHooks):
    """Changes the written file while the engine is given the weights, before the export is checked."""

    def __init__(self, path, change):
        self.path = path
        self.change = change

    def on_engine_refresh(self, trainer, pl_module, engine):
        if self.path.exists():
            self.change(self.path)


def other_bytes(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [(other_bytes, "is not what was to be written"), (lambda path: path.unlink(), "lacks")],
    ids=["other_bytes", "removed"],
)
def test_a_damaged_file_is_noticed(make_run, tmp_path, change, message):
    damage = Damage(tmp_path / "out" / "model.safetensors", change)
    with pytest.raises(RuntimeError, match=message):
        make_run(damage, ExportPolicy(folder=str(tmp_path / "out"))).fit()
    unchecked = ExportPolicy(folder=str(tmp_path / "unchecked"), check=False)
    make_run(Damage(tmp_path / "unchecked" / "model.safetensors", change), unchecked).fit()
    assert unchecked.exported is not None


def test_the_check_gives_the_final_weights_to_the_engine(make_run, make_recorder, tmp_path):
    recorder = make_recorder()
    make_run(recorder, ExportPolicy(folder=str(tmp_path / "out"))).fit()
    assert recorder.events == ["start", "refresh", "end", "refresh"]


def test_a_trial_run_exports_nothing(make_run, tmp_path):
    export = ExportPolicy(folder=str(tmp_path / "out"))
    val_prompts = ArithmeticPrompts("validation", max_operand=9, num_validation=20)
    make_run(export, trainer={"fast_dev_run": 1}, data={"val_prompts": val_prompts}).fit()
    assert export.exported is None
    assert not (tmp_path / "out").exists()


def test_a_run_that_fails_exports_nothing(make_run, make_recorder, tmp_path):
    def fail(trainer, pl_module, batch_idx):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        make_run(make_recorder(fail), ExportPolicy(folder=str(tmp_path / "out"))).fit()
    assert not (tmp_path / "out").exists()
