"""The policy as a Hugging Face folder, from weights or from a checkpoint: `drpo export`."""

import pickle
import sys
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from drpo_lightning.checkpoints import CHECKSUMS, verify_checkpoint
from drpo_lightning.disk import DiskFullError, check_writable, whole_files
from drpo_lightning.hub import make_repository, upload
from drpo_lightning.model_card import public_name, write_card
from drpo_lightning.modules.lora import LoRA, merge_saved_adapters
from drpo_lightning.rollout.adapters import adapter_weights, write_adapter

EXPORT_DTYPES = ("float32", "bfloat16", "float16")
NETWORK_PREFIX = "network.language_model."
"""What stands before the names of the language model's tensors in a checkpoint."""
WEIGHT_KEYS = ("state_dict", "model")
"""What a folder of shards keeps the weights under: saved by FSDP2, by FSDP1."""


def export_dtype(name: str | None) -> torch.dtype | None:
    """The precision to write of that name; `None`, that of the weights, stays `None`.

    Raises:
        ValueError: for a precision that is not exported.
    """
    if name not in (None, *EXPORT_DTYPES):
        raise ValueError(f"`dtype` must be one of {EXPORT_DTYPES}, got {name!r}")
    return None if name is None else getattr(torch, name)


def write_model(
    model: str, weights: Mapping[str, Tensor], folder: str | Path, *, trust_remote_code: bool = False
) -> None:
    """Writes weights, configuration and tokenizer by `save_pretrained`.

    Args:
        model: folder or hub name of the model that the weights were trained from.
        weights: the whole state dict, in the precision to write.
        folder: where to.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ValueError: if the weights are not those of the model, or the folder holds adapters.
        DiskFullError: if there is no room; what the folder held stays.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from drpo_lightning.rollout.weights import check_weights

    if (Path(folder) / "adapter_config.json").exists():
        raise ValueError(f"the folder {str(folder)!r} holds adapters, which would be added to the model; take another")
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    expected = {name: tensor.shape for name, tensor in language_model.state_dict().items()}
    check_weights({name: tensor.shape for name, tensor in weights.items()}, expected)
    language_model = language_model.to(next(iter(weights.values())).dtype)  # what config.json will say
    try:
        language_model.generation_config = GenerationConfig.from_pretrained(model)
    except OSError:  # not every model has one
        language_model.generation_config = None
    with whole_files(Path(folder)) as unfinished:
        language_model.save_pretrained(unfinished, state_dict=_tied(weights, language_model))
        AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code).save_pretrained(unfinished)
        _remove_other_shards(Path(folder), unfinished)


def _remove_other_shards(folder: Path, written: Path) -> None:
    """Removes weights of a model that was in the folder, which the new one has no files of the same names for."""
    for path in folder.glob("model*.safetensors*"):
        if not (written / path.name).exists():
            path.unlink()


def _tied(weights: Mapping[str, Tensor], language_model: torch.nn.Module) -> dict[str, Tensor]:
    """The weights with one tensor for each parameter: of a sharded model, tied ones come as equal tensors."""
    result = dict(weights)
    first: dict[torch.nn.Parameter, str] = {}
    for name, parameter in language_model.named_parameters(remove_duplicate=False):
        result[name] = weights[first.setdefault(parameter, name)]
    return result


def check_exported(folder: str | Path, weights: Mapping[str, Tensor]) -> None:
    """Reads an exported model back, a tensor at a time.

    Raises:
        RuntimeError: if a tensor is missing (other than a tied one, which is written once) or differs.
    """
    from safetensors import safe_open

    written: set[str] = set()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                if name not in weights or not torch.equal(file.get_tensor(name), weights[name]):
                    raise RuntimeError(f"the exported tensor {name!r} in {path} is not what was to be written")
                written.add(name)
    missing = [
        name
        for name in weights.keys() - written
        if not any(_is_tied(weights[name], weights[other]) for other in written)
    ]
    if missing:
        raise RuntimeError(f"the exported model in {folder} lacks {sorted(missing)[:5]}")


def _is_tied(tensor: Tensor, other: Tensor) -> bool:
    """True if two matrices are one: vectors, such as norms, may be equal by chance."""
    return tensor.ndim > 1 and torch.equal(tensor, other)


class PolicyState(NamedTuple):
    """What a checkpoint holds of a policy.

    Attributes:
        policy: what `PolicyModule.on_save_checkpoint` notes, with the name of the model that was trained, and under
            `training` what `ExportPolicy` notes of the training, or the number of updates alone.
        weights: tensors of the language model by their names in it.
    """

    policy: dict[str, Any]
    weights: dict[str, Tensor]


def read_checkpoint(checkpoint: str | Path, *, dtype: str | None = None) -> PolicyState:
    """Reads the policy of a Lightning checkpoint, without the states of the optimizer, in one process.

    Args:
        checkpoint: a checkpoint of a `PolicyModule`: one file, or a folder of shards saved by any number of ranks.
        dtype: precision to read into; by default as saved.

    Raises:
        ValueError: if it does not exist, is incomplete, has changed since it was written, or holds no policy.
    """
    path = Path(checkpoint)
    read = _read_folder if path.is_dir() else _read_file
    return read(path, export_dtype(dtype))


def _read_file(path: Path, dtype: torch.dtype | None) -> PolicyState:
    if not path.is_file():
        raise ValueError(f"the checkpoint {str(path)!r} is no file")
    content = _load(path)
    policy = _policy(path, content)
    tensors = {key: tensor for key, tensor in content["state_dict"].items() if key.startswith(NETWORK_PREFIX)}
    return PolicyState(policy, {key.removeprefix(NETWORK_PREFIX): t.to(dtype or t.dtype) for key, t in tensors.items()})


def _load(path: Path) -> dict[str, Any]:
    """Verifies and loads a file, memory-mapped: states of the optimizer take no memory."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"the checkpoint {str(path)!r} is cut off, or no file that PyTorch has saved")
    verify_checkpoint(path)
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return content


def _policy(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    if "policy" not in content:
        raise ValueError(f"the checkpoint {str(path)!r} holds no policy: it was not written by `drpo fit`")
    known = {"base_model": public_name(content["policy"]["model"])}
    known |= {"updates": content["global_step"]} if "global_step" in content else {}
    return {**content["policy"], "training": content.get("training", known)}


def _read_folder(path: Path, dtype: torch.dtype | None) -> PolicyState:
    """Reads a folder of shards: the tensors are allocated, and each is filled from the files that have parts of it."""
    for name in (".metadata", "meta.pt"):
        if not (path / name).is_file():
            raise ValueError(f"the checkpoint {str(path)!r} has no {name}: it is no folder of shards, or half of one")
    if (path / CHECKSUMS).exists():  # Lightning's own `ModelCheckpoint` writes none
        verify_checkpoint(path)
    policy = _policy(path, _load(path / "meta.pt"))
    reader = _ShardReader(path)
    metadata = reader.read_metadata()
    sizes = _saved_weights(metadata)
    _check_shards(path, metadata, sizes.keys())
    tensors = {key: torch.empty(saved.size, dtype=dtype or saved.properties.dtype) for key, saved in sizes.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as asked for
        load(tensors, storage_reader=reader, no_dist=True)
    return PolicyState(policy, {key.partition(NETWORK_PREFIX)[2]: tensor for key, tensor in tensors.items()})


def _saved_weights(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """The language model's tensors in a folder of shards, by their keys in it."""
    prefixes = tuple(f"{key}.{NETWORK_PREFIX}" for key in WEIGHT_KEYS)
    return {
        key: saved
        for key, saved in metadata.state_dict_metadata.items()
        if key.startswith(prefixes) and isinstance(saved, TensorStorageMetadata)
    }


def _check_shards(path: Path, metadata: Metadata, keys: Iterable[str]) -> None:
    """Raises `ValueError` if a file that holds a part of the weights is missing or cut off."""
    keys = set(keys)
    for index, stored in metadata.storage_data.items():
        file = path / stored.relative_path
        if index.fqn in keys and (not file.is_file() or file.stat().st_size < stored.offset + stored.length):
            raise ValueError(f"the checkpoint {str(path)!r} is incomplete: its {file.name} is missing or cut off")


class _ShardReader(FileSystemReader):
    """Reads shards without running code that a pickle may bring; those of tensors are read so by PyTorch itself."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: ANN401, ARG002
        """See `FileSystemReader`, which takes any pickle."""
        with (Path(self.path) / ".metadata").open("rb") as file:
            try:
                metadata: Metadata = _MetadataUnpickler(file).load()
            except (pickle.UnpicklingError, EOFError) as error:
                raise ValueError(f"{file.name!r} is cut off, or not PyTorch's: {error}") from error
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickles `.metadata`, which PyTorch writes by `pickle` alone; a folder from elsewhere is to run no code."""

    CLASSES = frozenset(
        f"torch.distributed.checkpoint.{name}"
        for name in (
            "filesystem._StorageInfo",
            "metadata.BytesStorageMetadata",
            "metadata.ChunkStorageMetadata",
            "metadata.Metadata",
            "metadata.MetadataIndex",
            "metadata.StorageMeta",
            "metadata.TensorProperties",
            "metadata.TensorStorageMetadata",
            "metadata._MEM_FORMAT_ENCODING",
        )
    ) | {"torch.Size", "torch.serialization._get_layout", "pathlib.PosixPath", "pathlib._local.PosixPath"}

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        """The classes of a checkpoint's metadata, and torch's data types."""
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) == ("builtins", "getattr"):  # so Python 3.11.2, of Debian 12, pickles enumerations
            return _enum_member
        if f"{module}.{name}" not in self.CLASSES:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _enum_member(enumeration: object, name: str) -> Enum:
    if not (isinstance(enumeration, type) and issubclass(enumeration, Enum)):
        raise pickle.UnpicklingError(f"it asks for {name!r} of {enumeration!r}")
    return enumeration[name]


def export_checkpoint(
    checkpoint: str | Path,
    folder: str | Path,
    *,
    dtype: str | None = None,
    adapter: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Writes the policy of a Lightning checkpoint as a Hugging Face folder.

    Adapters that it was trained with are merged into the model that they were trained on.

    Args:
        checkpoint: see `read_checkpoint`.
        folder: where to.
        dtype: precision to write; by default as saved.
        adapter: writes the adapters alone, as PEFT's folder.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ValueError: if the checkpoint does not exist, is damaged or holds no policy, or no adapters where they are
            asked for; or if the folder cannot be written to.
        DiskFullError: if there is no room; what the folder held stays.
    """
    check_writable(Path(folder), "the folder to write")
    state = read_checkpoint(checkpoint, dtype=dtype)
    model, weights = state.policy["model"], state.weights
    settings = None if state.policy.get("peft") is None else LoRA(**state.policy["peft"])
    if adapter:
        if settings is None:
            raise ValueError(f"the checkpoint {str(checkpoint)!r} has no adapters; leave `adapter` out")
        weights = dict(adapter_weights(weights.items()))
        write_adapter(folder, settings.adapter_config(model), weights.items())
    else:
        if settings is not None:  # merged before they are rounded
            adapters = read_checkpoint(checkpoint).weights
            merged = merge_saved_adapters(model, settings, adapters, trust_remote_code=trust_remote_code)
            weights = {name: tensor.to(export_dtype(dtype) or tensor.dtype) for name, tensor in merged.items()}
        write_model(model, weights, folder, trust_remote_code=trust_remote_code)
    check_exported(folder, weights)
    write_card(Path(folder), state.policy["training"], is_adapter=adapter)


def main(arguments: list[str]) -> None:
    """`drpo export --ckpt CHECKPOINT --out FOLDER`."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="drpo export", description=__doc__)
    parser.add_argument(
        "--ckpt", type=str, required=True, help="Lightning checkpoint of a policy: a file, or a folder of shards"
    )
    parser.add_argument("--out", type=str, required=True, help="folder to write")
    parser.add_argument("--dtype", type=str | None, default=None, help="precision to write, such as bfloat16")
    parser.add_argument("--adapter", type=bool, default=False, help="write the LoRA adapters alone, as PEFT's folder")
    parser.add_argument("--trust_remote_code", type=bool, default=False, help="run code that comes with the model")
    parser.add_argument(
        "--push_to_hub", type=str | None, default=None, help="repository on the Hugging Face hub, owner/name"
    )
    parser.add_argument("--private", type=bool, default=True, help="make that repository a private one")
    config = parser.parse_args(arguments)
    try:
        if config.push_to_hub:
            make_repository(config.push_to_hub, private=config.private)
        export_checkpoint(
            config.ckpt,
            config.out,
            dtype=config.dtype,
            adapter=config.adapter,
            trust_remote_code=config.trust_remote_code,
        )
    except ValueError as error:
        parser.error(str(error))
    except DiskFullError as error:
        sys.exit(f"drpo export: error: {error}")
    print(f"Policy exported to {config.out}")  # noqa: T201
    if config.push_to_hub:
        try:
            print(f"Policy uploaded to {upload(config.out, config.push_to_hub)}")  # noqa: T201
        except RuntimeError as error:
            sys.exit(f"drpo export: error: {error}")
