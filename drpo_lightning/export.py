"""The policy as a Hugging Face folder, from weights or from a checkpoint: `drpo export`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

EXPORT_DTYPES = ("float32", "bfloat16", "float16")
NETWORK_PREFIX = "network.language_model."
"""What stands before the names of the language model's tensors in a checkpoint."""


def write_model(
    model: str,
    weights: Mapping[str, Tensor],
    folder: str | Path,
    *,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Writes weights, configuration and tokenizer by `save_pretrained`.

    Args:
        model: folder or hub name of the model that the weights were trained from.
        weights: the whole state dict.
        folder: where to.
        dtype: precision to write, such as `bfloat16`; by default that of the weights.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ValueError: if the weights are not those of the model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    from drpo_lightning.rollout.weights import check_weights

    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    expected = {name: tensor.shape for name, tensor in language_model.state_dict().items()}
    check_weights({name: tensor.shape for name, tensor in weights.items()}, expected)
    cast = {name: _cast(tensor, dtype) for name, tensor in weights.items()}
    language_model = language_model.to(next(iter(cast.values())).dtype)  # what config.json will say
    try:
        language_model.generation_config = GenerationConfig.from_pretrained(model)
    except OSError:  # not every model has one
        language_model.generation_config = None
    language_model.save_pretrained(folder, state_dict=cast)
    AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code).save_pretrained(folder)


def check_exported(folder: str | Path, weights: Mapping[str, Tensor], *, dtype: str | None = None) -> None:
    """Reads an exported model back, a tensor at a time.

    Raises:
        RuntimeError: if a tensor is missing (other than a tied one, which is written once) or differs.
    """
    from safetensors import safe_open

    written: set[str] = set()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                if not torch.equal(file.get_tensor(name), _cast(weights[name], dtype)):
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


def _cast(tensor: Tensor, dtype: str | None) -> Tensor:
    if dtype not in (None, *EXPORT_DTYPES):
        raise ValueError(f"`dtype` must be one of {EXPORT_DTYPES}, got {dtype!r}")
    return tensor if dtype is None else tensor.to(getattr(torch, dtype))


def export_checkpoint(
    checkpoint: str | Path, folder: str | Path, *, dtype: str | None = None, trust_remote_code: bool = False
) -> None:
    """Writes the policy of a Lightning checkpoint as a Hugging Face folder.

    Args:
        checkpoint: a checkpoint of a `PolicyModule`, one file.
        folder: where to.
        dtype: precision to write; by default float32, as trained.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ValueError: if the file does not exist or holds no policy.
    """
    path = Path(checkpoint)
    if path.is_dir():
        raise ValueError(
            f"the checkpoint {str(path)!r} is a folder of shards; train with the strategy's "
            "`save_distributed_checkpoint: false`, which writes one file"
        )
    if not path.is_file():
        raise ValueError(f"the checkpoint {str(path)!r} is no file")
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if "policy" not in content:
        raise ValueError(f"the checkpoint {str(path)!r} holds no policy: it was not written by `drpo fit`")
    weights = {
        name.removeprefix(NETWORK_PREFIX): tensor
        for name, tensor in content["state_dict"].items()
        if name.startswith(NETWORK_PREFIX)
    }
    write_model(content["policy"]["model"], weights, folder, dtype=dtype, trust_remote_code=trust_remote_code)
    check_exported(folder, weights, dtype=dtype)


def main(arguments: list[str]) -> None:
    """`drpo export --ckpt FILE --out FOLDER`."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog="drpo export", description=__doc__)
    parser.add_argument("--ckpt", type=str, required=True, help="Lightning checkpoint of a policy")
    parser.add_argument("--out", type=str, required=True, help="folder to write")
    parser.add_argument("--dtype", type=str | None, default=None, help="precision to write, such as bfloat16")
    parser.add_argument("--trust_remote_code", type=bool, default=False, help="run code that comes with the model")
    config = parser.parse_args(arguments)
    try:
        export_checkpoint(config.ckpt, config.out, dtype=config.dtype, trust_remote_code=config.trust_remote_code)
    except ValueError as error:
        parser.error(str(error))
    print(f"Policy exported to {config.out}")  # noqa: T201
