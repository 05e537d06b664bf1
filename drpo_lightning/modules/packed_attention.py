"""Causal attention within each sample of a packed sequence, as one of transformers' attention implementations.

Its cost grows with the sum of the squares of the samples' lengths, not with the square of their sum.
"""

import inspect
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from drpo_lightning.modules.packing import PackedSequences

NAME = "drpo_packed"
"""Of this implementation among transformers'."""
MAX_FLASH_HEAD_DIM = 256
WITHOUT_EFFECT = {
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_router_logits",
}
"""Keyword arguments of attention functions that change nothing about packed sequences."""
GROUPED_QUERIES = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
"""What tells torch that queries may have more heads than keys; the first versions do not ask for it."""


def use_packed_attention(language_model: Any) -> bool:  # noqa: ANN401
    """Sets a model's attention to `packed_attention`; returns False if it has one that cannot be set."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    language_model.set_attn_implementation(NAME)
    return bool(language_model.config._attn_implementation == NAME)


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads seq head_dim"],
    key: Float[Tensor, "batch kv_heads seq head_dim"],
    value: Float[Tensor, "batch kv_heads seq head_dim"],
    attention_mask: Tensor | None,
    *,
    packed_sequences: PackedSequences | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,  # noqa: ANN401
) -> tuple[Float[Tensor, "batch seq heads head_dim"], None]:
    """Attention of a packed sequence if the model was called with `packed_inputs`, and `sdpa` if not.

    Half precision on a CUDA GPU takes torch's kernel for variable lengths; all else takes `sdpa` on samples of similar
    lengths together.

    Args:
        module: the model's attention.
        query: rotated already.
        key: likewise.
        value: what is averaged.
        attention_mask: without effect on a packed sequence.
        packed_sequences: its samples.
        dropout: left out for a packed sequence: pi would differ from mu by noise.
        scaling: factor of the products of queries and keys; by default head_dim^-1/2.
        sliding_window: tokens that a token sees, itself included; by default all before it.
        others: what this model's attention asks for beside.

    Raises:
        ValueError: if it asks for something that is not there for packed sequences.
    """
    if packed_sequences is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    check_supported(module, **others)
    if torch.is_autocast_enabled(query.device.type):  # which rotary embeddings undo for queries and keys
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    # [1, heads, tokens, head_dim] -> [tokens, heads, head_dim], as the projections have made them
    states = (query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1))
    has_kernel = packed_sequences.has_flash_kernel and _fits_flash_kernel(query, value)
    attention = _varlen_attention if has_kernel else _grouped_attention
    return attention(module, states, packed_sequences, scaling, sliding_window)[None], None


def check_supported(module: nn.Module, *, is_causal: bool | None = None, **others: Any) -> None:  # noqa: ANN401
    """Raises `ValueError` if a model's attention asks for more than causal attention, scaled and in a window.

    Args:
        module: the model's attention.
        is_causal: what it says of a call; by default what it says of itself.
        others: what it asks for beside scale and window.
    """
    asked = sorted(name for name, value in others.items() if value is not None and name not in WITHOUT_EFFECT)
    if asked:
        raise ValueError(f"its attention has {', '.join(f'`{name}`' for name in asked)}")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError("its attention is not causal")


def _fits_flash_kernel(query: Tensor, value: Tensor) -> bool:
    head_dim = query.shape[-1]
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    return is_half and value.shape[-1] == head_dim <= MAX_FLASH_HEAD_DIM and head_dim % 8 == 0


def _varlen_attention(
    module: nn.Module,  # noqa: ARG001
    states: tuple[Tensor, Tensor, Tensor],
    sequences: PackedSequences,
    scaling: float | None,
    sliding_window: int | None,
) -> Float[Tensor, "tokens heads head_dim"]:
    """Torch's kernel: flash attention of all samples at once."""
    boundaries, length = sequences.cumulative_lengths, sequences.max_length
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    settings: dict[str, Any] = {"scale": scaling, "window_size": window} | GROUPED_QUERIES
    return varlen_attn(*states, boundaries, boundaries, length, length, **settings)  # type: ignore[return-value]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _grouped_attention(
    module: nn.Module,
    states: tuple[Tensor, Tensor, Tensor],
    sequences: PackedSequences,
    scaling: float | None,
    sliding_window: int | None,
) -> Float[Tensor, "tokens heads head_dim"]:
    """`sdpa` of samples of similar lengths together. Their padding stands on the right, where no token looks."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    groups, outputs = sequences.groups, []
    for places in groups.places:
        inputs = [
            state.index_select(0, places.flatten()).view(*places.shape, *state.shape[1:]).transpose(1, 2)
            for state in states
        ]
        mask = _window_mask(places.shape[1], sliding_window, places.device)
        output, _ = sdpa_attention_forward(module, *inputs, mask, scaling=scaling, is_causal=True)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs).index_select(0, groups.restore)


def _window_mask(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """True where a token is seen: itself and those before it in its window. None if that is all of them."""
    if window is None or length <= window:
        return None
    places = torch.arange(length, device=device)
    distance = places[:, None] - places
    return ((distance >= 0) & (distance < window))[None, None]
