"""Floating-point operations that a policy needs for its tokens, and how many a device can do at best."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

TERA = 1e12
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    "V100-SXM2": {"float16": 125, "float32": 15.7},
    "T4": {"float16": 65, "float32": 8.1},
    "A100": {"bfloat16": 312, "float16": 312, "tfloat32": 156, "float32": 19.5},
    "A40": {"bfloat16": 149.7, "float16": 149.7, "tfloat32": 74.8, "float32": 37.4},
    "RTX A6000": {"bfloat16": 154.8, "float16": 154.8, "tfloat32": 77.4, "float32": 38.7},
    "L4": {"bfloat16": 121, "float16": 121, "tfloat32": 60, "float32": 30.3},
    "L40S": {"bfloat16": 362, "float16": 362, "tfloat32": 183, "float32": 91.6},
    "H100 80GB HBM3": {"bfloat16": 989.4, "float16": 989.4, "tfloat32": 494.7, "float32": 66.9},
    "H100 PCIe": {"bfloat16": 756, "float16": 756, "tfloat32": 378, "float32": 51.2},
    "H100 NVL": {"bfloat16": 835.5, "float16": 835.5, "tfloat32": 417.5, "float32": 60},
    "H200": {"bfloat16": 989.4, "float16": 989.4, "tfloat32": 494.7, "float32": 66.9},
    "H200 NVL": {"bfloat16": 835.5, "float16": 835.5, "tfloat32": 417.5, "float32": 60},
    "GH200": {"bfloat16": 989.4, "float16": 989.4, "tfloat32": 494.7, "float32": 66.9},
    "B200": {"bfloat16": 2250, "float16": 2250, "tfloat32": 1125, "float32": 75},
    "MI300X": {"bfloat16": 1307.4, "float16": 1307.4, "tfloat32": 653.7, "float32": 163.4},
}
"""Matrix multiplications of dense matrices, in 10^12 operations per second, as the vendors state them.

Compare the figure of a GPU with its data sheet before you quote a utilization: not all of them have been. Where a sheet
gives the figure with sparsity it is halved. (Lightning's `get_available_flops` has the H200's and the
H100 NVL's doubled, takes an L40S for an L4, and does not know the name of an H200.)
"""


@dataclass(frozen=True)
class ModelSize:
    """What the operations of a dense transformer depend on.

    Args:
        body_parameters: of the matrices that every token is multiplied with, without the head and without embeddings,
            which are looked up.
        head_parameters: parameters of the head, also where they are those of the embeddings.
        attention_width: layers x query heads x dimension of a head.
        trained_parameters: those of body and head that get a gradient.
    """

    body_parameters: int
    head_parameters: int
    attention_width: int
    trained_parameters: int

    def forward_flops(self, *, num_tokens: float, num_head_tokens: float, squared_lengths: float) -> float:
        """Operations of a forward pass: 2 per parameter and token, and those of causal attention.

        Attention's products of queries with keys and of weights with values take 2 x 2 x width operations for each
        pair of a token and one that it sees; a sequence of T tokens has about T^2 / 2 of them.

        Args:
            num_tokens: tokens of all sequences, without padding.
            num_head_tokens: tokens whose successor's logprob is asked.
            squared_lengths: the sum of the squares of the sequences' lengths.
        """
        products = self.body_parameters * num_tokens + self.head_parameters * num_head_tokens
        return 2.0 * products + 2.0 * self.attention_width * squared_lengths

    def training_flops(self, *, num_tokens: float, num_head_tokens: float, squared_lengths: float) -> float:
        """Operations of a forward and a backward pass: 6 per parameter and token if all are trained.

        The backward pass takes as many as the forward pass for the gradient of the activations, and as many again for
        that of the parameters, those that are trained. Activations that are computed again by gradient checkpointing
        are not counted: they are no progress.

            training = 6 N T + 6 L H Q T^2      of one sequence of T tokens, all parameters trained

        Source: Chowdhery et al., PaLM, arXiv 2204.02311, appendix B, whose 12 L H Q T is for attention that sees all
        tokens; here it is causal, and takes half.

        Args:
            num_tokens: see `forward_flops`.
            num_head_tokens: see `forward_flops`.
            squared_lengths: see `forward_flops`.
        """
        forward = self.forward_flops(
            num_tokens=num_tokens, num_head_tokens=num_head_tokens, squared_lengths=squared_lengths
        )
        products = forward - 2.0 * self.attention_width * squared_lengths
        frozen = 1.0 - self.trained_parameters / (self.body_parameters + self.head_parameters)
        return 3.0 * forward - frozen * products


def model_size(language_model: Any, tensor_shapes: dict[str, torch.Size]) -> ModelSize | None:  # noqa: ANN401
    """What a causal language model's operations depend on; None if it is no dense transformer.

    A mixture of experts uses a part of its parameters for a token, and other kinds of layers do not say what theirs
    take.

    Args:
        language_model: any `AutoModelForCausalLM`; it may be sharded or on the meta device.
        tensor_shapes: name and whole shape of every tensor of its state dict, tied ones under each of their names.
    """
    config = language_model.config.get_text_config()
    heads, layers = getattr(config, "num_attention_heads", None), getattr(config, "num_hidden_layers", None)
    is_mixture = any(getattr(config, name, None) for name in ("num_experts_per_tok", "num_local_experts"))
    head_module = language_model.get_output_embeddings()
    if is_mixture or not heads or not layers or head_module is None:
        return None
    modules = {name.replace("_fsdp_wrapped_module.", ""): module for name, module in language_model.named_modules()}
    looked_up = {f"{name}.weight" for name, module in modules.items() if isinstance(module, nn.Embedding)}
    head = next(f"{name}." for name, module in modules.items() if module is head_module)
    sizes = {name: s.numel() for name, s in tensor_shapes.items() if len(s) > 1 and name not in looked_up}
    total, in_head = sum(sizes.values()), sum(size for name, size in sizes.items() if name.startswith(head))
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelSize(
        body_parameters=total - in_head,
        head_parameters=in_head,
        attention_width=layers * heads * width,
        trained_parameters=sum(size for name, size in sizes.items() if "lora_" in name) or total,
    )


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Operations per second that a device can do at best; None if the table does not have it.

    Args:
        device_name: what the driver calls it, such as `NVIDIA H100 80GB HBM3`.
        dtype: precision of the products: `bfloat16`, `float16`, `tfloat32` or `float32`.
    """
    words = f" {device_name} ".replace("-", " ")
    known = [name for name in PEAK_TFLOPS if f" {name.replace('-', ' ')} " in words]
    if not known or " MIG " in words:  # a part of a GPU
        return None
    tflops = PEAK_TFLOPS[max(known, key=len)].get(dtype)
    return None if tflops is None else tflops * TERA


def product_dtype(precision: str) -> str:
    """Precision of matrix products on a GPU under one of Lightning's `precision` settings, as in `peak_flops`."""
    if precision.startswith("bf16"):
        return "bfloat16"
    if precision.startswith("16"):
        return "float16"
    if precision.startswith("32"):
        return "float32" if torch.get_float32_matmul_precision() == "highest" else "tfloat32"
    return precision
