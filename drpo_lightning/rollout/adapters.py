"""Low-rank adapters (LoRA) as named tensors: merged into the weights they belong to, or as PEFT's folder.

An adapted linear layer has the weight W + scale B A, with W `[out, in]` frozen, A `[r, in]` and B `[out, r]` trained
and scale = alpha / r; Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drpo_lightning.disk import whole_files

PART = re.compile(r"(?P<module>.+)\.(?P<part>base_layer|lora_A\.default|lora_B\.default)\.(?P<kind>weight|bias)")
"""A tensor of an adapted layer in the state dict of a model that PEFT has put adapters into."""
SAVED_FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_A|lora_B)\.weight")
"""A tensor in PEFT's file."""


def is_adapter_weight(name: str) -> bool:
    """True for the trained factors A and B in a model's state dict."""
    match = PART.fullmatch(name)
    return match is not None and match["part"] != "base_layer"


def merged_weight(weight: Tensor, factor_a: Tensor, factor_b: Tensor, scale: float) -> Tensor:
    """W + scale B A, computed in float32 and returned in the precision of W.

    Args:
        weight: W `[out, in]`.
        factor_a: A `[r, in]`.
        factor_b: B `[out, r]`.
        scale: alpha / r.
    """
    return torch.addmm(weight.float(), factor_b.float(), factor_a.float(), alpha=scale).to(weight.dtype)


def merged_weights(named: Iterable[tuple[str, Tensor]], scale: float) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights of the model without adapters that computes the same, one at a time.

    Args:
        named: name and tensor of a state dict with adapters; a tensor is valid until the next one is asked for.
        scale: alpha / r.
    """
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in named:
        match = PART.fullmatch(name)
        if match is None:
            yield name, tensor
        elif match["kind"] == "bias":
            yield f"{match['module']}.bias", tensor
        else:
            parts = waiting.setdefault(match["module"], {})
            parts[match["part"]] = tensor.clone()
            if len(parts) == 3:
                del waiting[match["module"]]
                merged = merged_weight(parts["base_layer"], parts["lora_A.default"], parts["lora_B.default"], scale)
                yield f"{match['module']}.weight", merged
    assert not waiting, f"incomplete adapters: {sorted(waiting)}"


def merged_shapes(shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """Name and shape of what `merged_weights` yields, from those of a state dict with adapters."""
    return {name.replace(".base_layer.", "."): shape for name, shape in shapes.items() if not is_adapter_weight(name)}


def adapter_weights(named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yields the factors A and B of a state dict under the names that PEFT's file has for them."""
    for name, tensor in named:
        match = PART.fullmatch(name)
        if match is not None and match["part"] != "base_layer":
            factor = match["part"].removesuffix(".default")
            yield f"base_model.model.{match['module']}.{factor}.weight", tensor


def paired_factors(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields the name of each adapted layer's weight with its A and B, from the tensors of PEFT's file.

    Raises:
        ValueError: if a tensor is no factor of an adapter, or one has no partner.
    """
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights:
        match = SAVED_FACTOR.fullmatch(name)
        if match is None:
            raise ValueError(f"{name!r} is no tensor of a LoRA adapter")
        factors.setdefault(match["module"], {})[match["part"]] = tensor.clone()
    for module, pair in factors.items():
        if len(pair) != 2:
            raise ValueError(f"the adapter of {module!r} lacks one of its two factors")
        yield f"{module}.weight", pair["lora_A"], pair["lora_B"]


def write_adapter(folder: str | Path, config: Mapping[str, Any], weights: Iterable[tuple[str, Tensor]]) -> None:
    """Writes an adapter as PEFT does: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        folder: where to; made if it does not exist, and what it holds of an adapter is replaced.
        config: content of `adapter_config.json`; its `target_modules` become the layers that there are weights for.
        weights: name and tensor, as `adapter_weights` yields them.

    Raises:
        ValueError: if the folder holds a whole model, which would be loaded with the adapters on top.
        DiskFullError: if there is no room; what the folder held stays.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    if (folder / "config.json").exists():
        raise ValueError(f"the folder {str(folder)!r} holds a model, on which adapters would be loaded; take another")
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in weights}
    layers = sorted({match["module"] for name in tensors if (match := SAVED_FACTOR.fullmatch(name))})
    content = {**config, "target_modules": layers}
    with whole_files(folder) as unfinished:
        (unfinished / "adapter_config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        save_file(tensors, unfinished / "adapter_model.safetensors", metadata={"format": "pt"})
