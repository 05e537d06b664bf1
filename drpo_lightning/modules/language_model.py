"""The causal language model behind a policy: with its weights, or as an empty shell that they are copied into."""

from typing import Any

import torch

from drpo_lightning.errors import SettingError, loading_model


def load_language_model(name: str, *, dtype: torch.dtype | str = torch.float32, trust_remote_code: bool = False) -> Any:  # noqa: ANN401
    """A causal language model with its weights, on the CPU.

    Args:
        name: folder or name on the Hugging Face hub.
        dtype: precision of the parameters; `auto` is that of the checkpoint.
        trust_remote_code: whether code that comes with the model may run.
    """
    from transformers import AutoModelForCausalLM

    with loading_model(name):
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)


def empty_language_model(name: str, *, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False) -> Any:  # noqa: ANN401
    """The same model without memory for its parameters, which are on the meta device; buffers are real.

    Buffers are made by the constructor and partly not in any checkpoint, such as the frequencies of rotary embeddings.

    Args:
        name: folder or name on the Hugging Face hub.
        dtype: precision that the parameters will have.
        trust_remote_code: whether code that comes with the model may run.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    with init_empty_weights(include_buffers=False):
        language_model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    language_model.tie_weights()
    return language_model


def prepare_for_training(language_model: Any, *, gradient_checkpointing: bool = False, compile: bool = False) -> None:  # noqa: A002, ANN401
    """Sets a model up to be a policy: without dropout, under which pi would differ from mu by noise.

    Args:
        language_model: changed in place.
        gradient_checkpointing: computes activations again in the backward pass instead of keeping them.
        compile: compiles each layer by `torch.compile` when it is first used.
    """
    language_model.train(gradient_checkpointing)  # transformers checkpoints in training mode only
    if gradient_checkpointing:
        for module in language_model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        language_model.gradient_checkpointing_enable({"use_reentrant": False})
    if compile:
        for layer in layers(language_model):
            layer.compile(dynamic=True)


def layers(language_model: Any) -> list[torch.nn.Module]:  # noqa: ANN401
    """The model's blocks, which it says must not be split: what is sharded, gathered and compiled one at a time.

    Raises:
        SettingError: if it does not say.
    """
    names = set(language_model._no_split_modules or ())
    found = [module for module in language_model.modules() if type(module).__name__ in names]
    if not found:
        raise SettingError(
            f"{type(language_model).__name__} does not say what its layers are (`_no_split_modules`): it can neither "
            "be sharded nor compiled by layers; take `ddp`, and leave `model.compile_layers` out"
        )
    return found
