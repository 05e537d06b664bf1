"""A checkpoint becomes a folder that transformers loads, or an error that names the file."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from drpo_lightning.export import check_exported, export_checkpoint, main, write_model


@pytest.fixture
def trained(make_run, make_recorder, tmp_path):
    """The weights of a run, and its checkpoint."""
    path = tmp_path / "run.ckpt"
    run = make_run(make_recorder(lambda trainer, *_: trainer.save_checkpoint(path)))
    run.fit()
    return {name: tensor.clone() for name, tensor in run.module.named_weights()}, path


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def test_a_checkpoint_gives_the_weights_it_holds(trained, tmp_path):
    weights, path = trained
    export_checkpoint(path, tmp_path / "out")
    exported = loaded(tmp_path / "out")
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], weights[name]) for name in weights)


def test_the_command_writes_the_folder(trained, tmp_path, capsys):
    weights, path = trained
    main(["--ckpt", str(path), "--out", str(tmp_path / "out"), "--dtype", "bfloat16"])
    assert f"Policy exported to {tmp_path / 'out'}" in capsys.readouterr().out
    assert all(torch.equal(tensor, weights[name].bfloat16()) for name, tensor in loaded(tmp_path / "out").items())


def test_what_is_no_checkpoint_of_a_policy_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"the checkpoint '.*none\.ckpt' is no file"):
        export_checkpoint(tmp_path / "none.ckpt", tmp_path / "out")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt' holds no policy: it was not written by `drpo fit`"):
        export_checkpoint(tmp_path / "other.ckpt", tmp_path / "out")


def test_the_command_ends_with_a_usage_message(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--ckpt", str(tmp_path / "none.ckpt"), "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "is no file" in capsys.readouterr().err


def test_weights_of_another_model_are_refused(trained, model_folder, tmp_path):
    weights, _ = trained
    weights["extra"] = weights.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"missing: model\.norm\.weight; unknown: extra"):
        write_model(model_folder, weights, tmp_path / "out")


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_every_exported_tensor_is_compared(trained, model_folder, tmp_path, name):
    weights, _ = trained
    write_model(model_folder, weights, tmp_path)
    check_exported(tmp_path, weights)
    with pytest.raises(RuntimeError, match=r"is not what was to be written|lacks \['lm_head\.weight'\]"):
        check_exported(tmp_path, weights | {name: weights[name] + 1})


def test_a_dtype_that_torch_has_not_is_named(trained, model_folder, tmp_path):
    weights, _ = trained
    with pytest.raises(ValueError, match=r"`dtype`.*'bfloat61'"):
        write_model(model_folder, weights, tmp_path, dtype="bfloat61")
