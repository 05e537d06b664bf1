"""LoRA: only low-rank adapters of the linear layers are trained."""

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from drpo_lightning.errors import SettingError
from drpo_lightning.modules.language_model import load_language_model
from drpo_lightning.rollout.adapters import is_adapter_weight, merged_weights
from drpo_lightning.rollout.weights import check_weights


@dataclass(frozen=True)
class LoRA:
    """Trains low-rank adapters, W + lora_alpha / r B A, and leaves the model's own weights W as they are.

    There is no dropout, on purpose: pi would differ from mu by noise. B starts at 0: the policy is the model.

    Args:
        r: rank of the adapters: A is `[r, in]`, B is `[out, r]`.
        lora_alpha: numerator of their scale, lora_alpha / r.
        target_modules: linear layers that get one: `all-linear` for all but the head, a list of names or ends of
            names, such as `q_proj`, or a regular expression of whole names.
        sync: what the engine gets: `merged` sends all weights with the adapters added, in the engine's precision;
            `adapter` sends the adapters alone, which the engine keeps apart from its weights.
        seed: of the values A starts with.

    Raises:
        ValueError: if a setting is out of range.
    """

    r: int = 16
    lora_alpha: float = 32.0
    target_modules: str | list[str] = "all-linear"
    sync: Literal["merged", "adapter"] = "merged"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ValueError(f"`model.peft.r` must be at least 1, got {self.r}")
        if not 0 < self.lora_alpha < float("inf"):
            raise ValueError(f"`model.peft.lora_alpha` must be positive and finite, got {self.lora_alpha}")
        if not self.target_modules:
            raise ValueError(f"`model.peft.target_modules` must name a layer, got {self.target_modules!r}")
        if self.sync not in ("merged", "adapter"):
            raise ValueError(f"`model.peft.sync` must be `merged` or `adapter`, got {self.sync!r}")

    @property
    def scale(self) -> float:
        """Factor of B A: alpha / r."""
        return self.lora_alpha / self.r

    @property
    def trained_settings(self) -> dict[str, Any]:
        """What a checkpoint's adapters depend on: not how the engine gets them, nor what they started with."""
        return {"r": self.r, "lora_alpha": self.lora_alpha, "target_modules": self.target_modules}

    def adapter_config(self, model: str) -> dict[str, Any]:
        """Content of PEFT's `adapter_config.json`.

        Args:
            model: folder or hub name of the model that the adapters belong to.
        """
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": model,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "target_modules": self.target_modules,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
        }


def check_peft_available() -> None:
    """Raises `SettingError` if PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise SettingError("`model.peft` needs PEFT, which is not installed: pip install 'drpo-lightning[lora]'")


def attach_adapter(language_model: Any, settings: LoRA, *, dtype: torch.dtype = torch.float32) -> None:  # noqa: ANN401
    """Puts adapters into a model and freezes everything else; the model stays of its own class.

    They are on the device of their layers, which may be the meta device. What A starts with depends on `settings.seed`
    and the model's layers alone: it is the same on every rank, and no random numbers of the run are used up.

    Args:
        language_model: a causal language model, changed in place.
        settings: of the adapters.
        dtype: precision of the adapters, whatever that of the model is.

    Raises:
        SettingError: if PEFT is not installed, or `target_modules` names no linear layer.
    """
    check_peft_available()
    from peft import LoraConfig, inject_adapter_in_model

    targets = targeted_layers(language_model, settings.target_modules)
    config = LoraConfig(r=settings.r, lora_alpha=settings.lora_alpha, target_modules=targets)
    inject_adapter_in_model(config, language_model, low_cpu_mem_usage=True)  # without memory, to be filled here
    generator = torch.Generator().manual_seed(settings.seed)
    for name in targets:
        layer = language_model.get_submodule(name)
        weight = layer.base_layer.weight
        bound = layer.in_features**-0.5
        factor_a = torch.empty(settings.r, layer.in_features).uniform_(-bound, bound, generator=generator)
        factor_b = torch.zeros(layer.out_features, settings.r)
        layer.lora_A["default"].weight = nn.Parameter(factor_a.to(weight.device, dtype))
        layer.lora_B["default"].weight = nn.Parameter(factor_b.to(weight.device, dtype))


def targeted_layers(language_model: Any, target_modules: str | list[str]) -> list[str]:  # noqa: ANN401
    """Names of the linear layers that get an adapter. The head gets none: it may be tied to the embedding.

    Raises:
        SettingError: if one of the names, or the regular expression, fits no linear layer.
    """
    head = language_model.get_output_embeddings()
    names = [
        name for name, module in language_model.named_modules() if isinstance(module, nn.Linear) and module is not head
    ]
    available = ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none"
    unknown: list[str] = []
    if target_modules == "all-linear":
        chosen = names
    elif isinstance(target_modules, str):
        chosen = [name for name in names if re.fullmatch(target_modules, name)]
    else:
        chosen = [name for name in names if any(_ends_with(name, target) for target in target_modules)]
        unknown = [target for target in target_modules if not any(_ends_with(name, target) for name in names)]
    if unknown or not chosen:
        raise SettingError(
            f"`model.peft.target_modules` {unknown or target_modules!r} names no linear layer of the model but its "
            f"head, which gets no adapter; there are {available}"
        )
    return chosen


def _ends_with(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def drop_frozen_weights(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:  # noqa: ANN401, ARG001
    """Leaves the adapters alone in the state dict of a module whose `network` has them: a hook of `nn.Module`."""
    for name in list(state_dict):
        if name.startswith(f"{prefix}network.") and not is_adapter_weight(name):
            del state_dict[name]


def check_adapter_settings(settings: LoRA | None, saved: dict[str, Any] | None) -> None:
    """Raises `SettingError` unless a checkpoint's adapters, or its lack of them, are those of the policy.

    Args:
        settings: of the policy; None without adapters.
        saved: `LoRA.trained_settings` of the checkpoint; None if it has all weights.
    """
    wanted = None if settings is None else settings.trained_settings
    if wanted != saved:
        raise SettingError(f"`model.peft` is {_describe(wanted)}, and the checkpoint has {_describe(saved)}")


def _describe(settings: dict[str, Any] | None) -> str:
    return "null, all weights" if settings is None else f"adapters with {settings}"


def merge_saved_adapters(
    model: str, settings: LoRA, adapters: Mapping[str, Tensor], *, trust_remote_code: bool = False
) -> dict[str, Tensor]:
    """The weights of the model without adapters that computes the same as a checkpoint's policy, in float32.

    Args:
        model: folder or hub name of the model that the adapters were trained on.
        settings: of the adapters.
        adapters: every A and B by its name in the adapted model's state dict.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ValueError: if the adapters are not those that the settings put into the model.
    """
    language_model = load_language_model(model, trust_remote_code=trust_remote_code)
    attach_adapter(language_model, settings)
    state = language_model.state_dict()
    own = {name: tensor.shape for name, tensor in state.items() if is_adapter_weight(name)}
    check_weights({name: tensor.shape for name, tensor in adapters.items()}, own)
    state.update(adapters)
    return dict(merged_weights(state.items(), settings.scale))
