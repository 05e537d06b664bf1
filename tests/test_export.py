"""A checkpoint becomes a folder that transformers loads, or an error that names the file."""

import io
import os
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import AutoModelForCausalLM

from drpo_lightning.checkpoints import _checksum, _write_checksums
from drpo_lightning.export import (
    _MetadataUnpickler,
    check_exported,
    export_checkpoint,
    main,
    read_checkpoint,
    write_model,
)
from drpo_lightning.rollout.adapters import write_adapter


@pytest.fixture
def trained(make_run, make_recorder, tmp_path):
    """The weights of a run, and its checkpoint."""
    path = tmp_path / "run.ckpt"
    run = make_run(make_recorder(lambda trainer, *_: trainer.save_checkpoint(path)))
    run.fit()
    return {name: tensor.clone() for name, tensor in run.module.named_weights()}, path


def test_a_model_and_its_adapters_do_not_share_a_folder(trained, model_folder, tmp_path):
    # transformers would load the adapters on top of the model that they were merged into.
    write_model(model_folder, trained[0], tmp_path / "model")
    with pytest.raises(ValueError, match=r"model' holds a model, on which adapters would be loaded; take another"):
        write_adapter(tmp_path / "model", {}, [])
    write_adapter(tmp_path / "adapter", {}, [("base_model.model.q.lora_A.weight", torch.ones(1))])
    with pytest.raises(ValueError, match=r"adapter' holds adapters, which would be added to the model; take another"):
        write_model(model_folder, trained[0], tmp_path / "adapter")
    with pytest.raises(RuntimeError, match=r"'base_model\.model\.q\.lora_A\.weight' .* is not what was to be written"):
        check_exported(tmp_path / "adapter", trained[0])


@pytest.fixture
def shards(trained, tmp_path):
    """Writes the checkpoint as a folder of shards, with the weights under a key."""

    def write(key):
        content = torch.load(trained[1], weights_only=True)
        state = {key: content.pop("state_dict"), "optimizer_0": content.pop("optimizer_states")[0]}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            save(state, checkpoint_id=tmp_path / "shards.ckpt", no_dist=True)
        torch.save(content, tmp_path / "shards.ckpt" / "meta.pt")
        return tmp_path / "shards.ckpt"

    return write


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


@pytest.mark.parametrize("key", ["state_dict", "model"], ids=["as FSDP2", "as FSDP1"])
def test_a_folder_of_shards_gives_the_weights_it_holds(trained, shards, tmp_path, key):
    weights, _ = trained
    export_checkpoint(shards(key), tmp_path / "out")
    exported = loaded(tmp_path / "out")
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], weights[name]) for name in weights)


def test_tied_weights_that_come_as_two_tensors_are_written_once(trained, model_folder, tmp_path):
    weights = {name: tensor.clone() for name, tensor in trained[0].items()}
    write_model(model_folder, weights, tmp_path)
    check_exported(tmp_path, weights)
    before, written = (load_file(f"{folder}/model.safetensors").keys() for folder in (model_folder, tmp_path))
    assert written == before
    weights["lm_head.weight"] += 1
    write_model(model_folder, weights, tmp_path)
    with pytest.raises(RuntimeError, match=r"lacks \['lm_head\.weight'\]"):
        check_exported(tmp_path, weights)


def test_of_shards_only_the_weights_are_read_and_in_the_precision_asked_for(trained, shards):
    weights, path = trained
    for checkpoint in (path, shards("model")):
        state = read_checkpoint(checkpoint, dtype="bfloat16")
        assert state.weights.keys() == weights.keys()
        assert all(torch.equal(state.weights[name], weights[name].bfloat16()) for name in weights)


@pytest.mark.parametrize("name", [".metadata", "meta.pt", "__0_0.distcp"])
def test_half_a_folder_of_shards_is_named_with_what_it_lacks(shards, tmp_path, name):
    folder = shards("state_dict")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 10])
    with pytest.raises(ValueError, match=rf"shards\.ckpt.*{name}.* cut off|shards\.ckpt/{name}' is cut off"):
        export_checkpoint(folder, tmp_path / "out")
    (folder / name).unlink()
    with pytest.raises(ValueError, match=rf"shards\.ckpt' (has no|is incomplete: its) {name}"):
        export_checkpoint(folder, tmp_path / "out")


def test_shards_of_no_policy_are_named(shards, tmp_path):
    folder = shards("state_dict")
    torch.save({"epoch": 1}, folder / "meta.pt")
    with pytest.raises(ValueError, match=r"shards\.ckpt' holds no policy"):
        export_checkpoint(folder, tmp_path / "out")


class Command:
    def __reduce__(self):
        return os.mkdir, ("run",)


class Member:
    """Pickled as Python 3.11.2 pickles the members of enumerations."""

    def __init__(self, owner, name):
        self.owner = owner
        self.name = name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_metadata_may_name_members_of_enumerations_and_no_other_attributes():
    member, method = (
        io.BytesIO(pickle.dumps(Member(*of)))
        for of in ((_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT"), (Metadata, "__init__"))
    )
    assert _MetadataUnpickler(member).load() is _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT
    with pytest.raises(pickle.UnpicklingError, match="it asks for '__init__' of <class"):
        _MetadataUnpickler(method).load()


def test_metadata_that_brings_a_command_is_refused(shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shards("state_dict")
    (folder / ".metadata").write_bytes(pickle.dumps(Command()))
    with pytest.raises(ValueError, match=r"metadata' is cut off, or not PyTorch's: it names posix\.mkdir"):
        export_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "run").exists()


def test_what_is_no_checkpoint_of_a_policy_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"the checkpoint '.*none\.ckpt' is no file"):
        export_checkpoint(tmp_path / "none.ckpt", tmp_path / "out")
    (tmp_path / "text.ckpt").write_text("weights")
    with pytest.raises(ValueError, match=r"text\.ckpt' is cut off, or no file that PyTorch has saved"):
        export_checkpoint(tmp_path / "text.ckpt", tmp_path / "out")
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


def test_a_dtype_that_is_not_exported_is_named(trained):
    with pytest.raises(ValueError, match=r"`dtype`.*'bfloat61'"):
        read_checkpoint(trained[1], dtype="bfloat61")


def flip_a_bit(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_that_has_changed_since_it_was_written_is_not_exported(trained, tmp_path, capsys):
    _, path = trained
    flip_a_bit(path)
    with pytest.raises(ValueError, match=r"run\.ckpt' is corrupt: its record '.*' has another checksum"):
        export_checkpoint(path, tmp_path / "out")
    with pytest.raises(SystemExit) as ended:
        main(["--ckpt", str(path), "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "has another checksum" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_shard_that_has_changed_since_it_was_written_is_not_exported(shards, tmp_path):
    folder = shards("state_dict")
    _write_checksums(folder, {path.name: _checksum(path) for path in folder.iterdir()})
    read_checkpoint(folder)
    flip_a_bit(folder / "__0_0.distcp")
    with pytest.raises(ValueError, match=r"shards\.ckpt' is corrupt: its __0_0\.distcp has another checksum"):
        export_checkpoint(folder, tmp_path / "out")
