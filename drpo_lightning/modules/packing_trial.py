"""Whether a language model computes the same of samples packed into one sequence as of each apart: it is tried."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from drpo_lightning.modules.packed_attention import NAME, check_supported, use_packed_attention
from drpo_lightning.modules.packing import packed_inputs

WINDOW_TRIAL = "drpo_window_trial"
LENGTHS = (5, 3, 4)
"""Tokens of the samples that are tried; windows are longer than that."""
TOLERANCE, HALF_PRECISION_TOLERANCE = 1e-4, 0.02
"""Largest difference of a token's hidden states, relative to their norm, that rounding may make. Six dense and mixed
models have made 3e-7 in float32 and 0 in bfloat16 on a CPU, three with a recurrent state 1e-3 to 0.1, untrained."""


@torch.no_grad()
def why_not_packed(language_model: Any) -> str | None:  # noqa: ANN401
    """Why samples cannot be packed for a model, in words; None if they can.

    Args:
        language_model: with its weights; in evaluation mode, or without dropout.
    """
    implementation = language_model.config._attn_implementation
    if implementation not in ("sdpa", NAME):
        return f"its attention is {implementation}, not sdpa"
    input_ids, attention_mask = _samples(language_model)
    padded = _of_padded(language_model, input_ids, attention_mask)
    try:
        _check_windows(language_model, input_ids)
        if not use_packed_attention(language_model):
            return "its attention cannot be exchanged"
        packed = _of_packed(language_model, input_ids, attention_mask)
        input_ids[:-1] = input_ids[:-1].flip(1)
        beside_others = _of_packed(language_model, input_ids, attention_mask)
    except ValueError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - whatever stops a foreign model is the reason
        return f"{type(error).__name__}: {error}"
    finally:
        language_model.set_attn_implementation(implementation)
    last = slice(-LENGTHS[-1], None)
    off, leaked = _difference(packed, padded), _difference(beside_others[last], packed[last])
    tolerance = TOLERANCE if padded.element_size() > 2 else HALF_PRECISION_TOLERANCE
    if not (off <= tolerance and leaked <= tolerance):  # NaN is neither
        return f"its hidden states are {off:.1g} off those of the samples apart, {leaked:.1g} by what others hold"
    return None


def _samples(language_model: Any) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:  # noqa: ANN401
    """Token ids of a few samples, padded, and which of them are no padding."""
    embedding = language_model.get_input_embeddings().weight
    attention_mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    input_ids = torch.arange(attention_mask.numel()).view_as(attention_mask) % len(embedding)
    return input_ids.to(embedding.device), attention_mask.to(embedding.device)


def _of_padded(language_model: Any, input_ids: Tensor, attention_mask: Tensor) -> Float[Tensor, "tokens hidden"]:  # noqa: ANN401
    """Last hidden states of the samples side by side, each with its padding."""
    output = language_model.base_model(input_ids=input_ids, attention_mask=attention_mask.long(), use_cache=False)
    return output.last_hidden_state[attention_mask]  # type: ignore[no-any-return]


def _of_packed(language_model: Any, input_ids: Tensor, attention_mask: Tensor) -> Float[Tensor, "tokens hidden"]:  # noqa: ANN401
    """Last hidden states of the samples packed."""
    output = language_model.base_model(**packed_inputs(input_ids, attention_mask))
    return output.last_hidden_state[0]  # type: ignore[no-any-return]


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm(dim=-1).max() / expected.norm(dim=-1).mean())


def _check_windows(language_model: Any, input_ids: Tensor) -> None:  # noqa: ANN401
    """Raises `ValueError` unless every attention is told of the window that the mask it gets is made for.

    The samples of the trial are too short to tell. So each layer gets, in place of a mask, the number of tokens that
    its mask would let be seen.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(WINDOW_TRIAL, _compared_attention)
    AttentionMaskInterface.register(WINDOW_TRIAL, _window_as_mask)
    language_model.set_attn_implementation(WINDOW_TRIAL)
    language_model.base_model(input_ids=input_ids[:1], use_cache=False)


def _window_as_mask(*, local_size: int | None = None, use_vmap: bool = False, device: Any = "cpu", **_: Any) -> Tensor:  # noqa: ANN401
    if use_vmap:
        raise ValueError("its attention has a mask of its own")
    return torch.full((1, 1, 1, 1), local_size or 0, device=device)


def _compared_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,  # noqa: ARG001
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    check_supported(module, **others)
    window = None if attention_mask is None else int(attention_mask) or None
    if window != sliding_window:
        raise ValueError(f"an attention whose mask is for a window of {window} tokens is told of {sliding_window}")
    return sdpa_attention_forward(module, query, key, value, None, scaling=scaling)  # type: ignore[no-any-return]
