"""A causal language model seen as a policy: tokens in, logprobs of those tokens, or entropies at their places, out."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from drpo_lightning.functional.linear_logprobs import linear_token_entropies
from drpo_lightning.functional.logprobs import target_logprobs
from drpo_lightning.modules.logprob_backends import TokenLogprobs
from drpo_lightning.modules.packed_attention import use_packed_attention
from drpo_lightning.modules.packing import packed_inputs
from drpo_lightning.modules.packing_trial import why_not_packed

ENLARGEMENT = 1000.0


class PolicyNetwork(nn.Module):
    """Logprobs of completion tokens, and entropies at their places, under a causal language model at a temperature.

    Everything that touches the weights goes through `forward`, as FSDP wants it.

    Args:
        language_model: any `AutoModelForCausalLM`.
        temperature: sampling temperature that the logits are divided by.
        token_logprobs: computes logprobs from the last hidden states.
        is_head_linear: what `head_is_linear` says of the model; by default it is asked, which takes a
            model that has its weights.
        is_packed: computes the tokens of a batch without its padding, which takes a model that `why_not_packed` has
            nothing against; by default it is asked.

    Attributes:
        tensor_shapes: name and whole shape of every tensor of the language model's state dict.
        num_parameters: of the whole model, tied ones counted once.
    """

    def __init__(
        self,
        language_model: Any,  # noqa: ANN401
        *,
        temperature: float = 1.0,
        token_logprobs: TokenLogprobs = TokenLogprobs(),  # noqa: B008 - frozen
        is_head_linear: bool | None = None,
        is_packed: bool | None = None,
    ) -> None:
        super().__init__()
        self.language_model = language_model
        self.temperature = temperature
        self.token_logprobs = token_logprobs
        self.is_head_linear = head_is_linear(language_model) if is_head_linear is None else is_head_linear
        self.is_packed = why_not_packed(language_model) is None if is_packed is None else is_packed
        if self.is_packed:
            use_packed_attention(language_model)
        self.tensor_shapes = {name: tensor.shape for name, tensor in language_model.state_dict().items()}
        self.num_parameters = sum(parameter.numel() for parameter in language_model.parameters())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PolicyNetwork":
        """Follows the module to another device or precision; buffers keep their precision.

        Lightning's `bf16-true` converts them too, and the frequencies of rotary embeddings round away.
        """
        before = [
            (module, name, buffer) for module in self.modules() for name, buffer in module.named_buffers(recurse=False)
        ]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name, buffer in before:
            setattr(module, name, buffer.to(getattr(module, name).device))
        return self

    def describe_logprobs(self) -> str:
        """One line: what computes logprobs from the last hidden states, and why."""
        if self.is_head_linear:
            return self.token_logprobs.describe()
        return "from whole logits (the model does more to them than a linear head)"

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Bool[Tensor, "batch seq"],
        completion_mask: Bool[Tensor, "batch seq"],
        topk_ids: Int[Tensor, "tokens k"] | None = None,
        *,
        returns_entropy: bool = False,
    ) -> Float[Tensor, "..."]:
        """Log pi of each completion token, and of other tokens in its place, given what stands before it.

        Args:
            input_ids: token ids, padded on the right.
            attention_mask: False on padding.
            completion_mask: True on the tokens whose logprob is asked; the first of a row cannot be.
            topk_ids: tokens that could stand in the place of each of them, whose logprobs are asked too, without a
                gradient; a row for each True of `completion_mask`, in order.
            returns_entropy: asks instead for the entropy of pi in the place of each of them, of the whole vocabulary at
                the temperature, without a gradient.

        Returns:
            Logprobs or entropies in nats, float32: `[batch, seq]`, aligned with `input_ids`, 0 outside
            `completion_mask`. With `topk_ids` `[tokens, 1 + k]`, a row for each True of `completion_mask`; the token
            itself comes first.

        Raises:
            ValueError: if both `topk_ids` and `returns_entropy` are given.
        """
        if returns_entropy and topk_ids is not None:
            raise ValueError("`returns_entropy` gives no logprobs, and must be False with `topk_ids`")
        asked = completion_mask.clone()
        asked[:, 0] = False
        # Counting them waits for a GPU; it is done here, before the model has given it work.
        places = asked.nonzero(as_tuple=True)
        states = self._states_before(places, input_ids, attention_mask)
        if returns_entropy:
            values = self._entropies(states)
        else:
            targets = input_ids[places]
            if topk_ids is not None:
                logprobs = self._logprobs(states, torch.cat([targets[:, None], topk_ids], 1))
                return torch.cat([logprobs[:, :1], logprobs[:, 1:].detach()], 1)
            values = self._logprobs(states, targets)
        return torch.zeros(asked.shape, dtype=torch.float32, device=asked.device).index_put(places, values)

    def _states_before(
        self,
        places: tuple[Int[Tensor, " tokens"], ...],
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Bool[Tensor, "batch seq"],
    ) -> Float[Tensor, "tokens size"]:
        """What tokens are predicted from: the last hidden states before them, or logits if the head is not linear.

        Args:
            places: rows and columns of the tokens; none is the first of a row.
            input_ids: see `forward`.
            attention_mask: likewise.
        """
        rows, columns = places
        before = rows * input_ids.shape[1] + columns - 1
        if self.is_packed:
            inputs = packed_inputs(input_ids, attention_mask)
            before = (attention_mask.flatten().cumsum(0) - 1).index_select(0, before)
        else:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask.long(), "use_cache": False}
        if self.is_head_linear:
            states = self.language_model.base_model(**inputs).last_hidden_state
        else:
            states = self.language_model(**inputs).logits
        return states.flatten(0, 1).index_select(0, before)  # type: ignore[no-any-return]

    def _logprobs(
        self, states: Float[Tensor, "tokens size"], targets: Int[Tensor, "tokens ..."]
    ) -> Float[Tensor, "tokens ..."]:
        if not self.is_head_linear:
            return target_logprobs(states, targets, temperature=self.temperature)
        head = self.language_model.get_output_embeddings()
        return self.token_logprobs(states, head.weight, targets, bias=head.bias, temperature=self.temperature)

    @torch.no_grad()
    def _entropies(self, states: Float[Tensor, "tokens size"]) -> Float[Tensor, " tokens"]:
        if not self.is_head_linear:
            return torch.special.entr((states.float() / self.temperature).softmax(1)).sum(1)  # type: ignore[no-any-return]
        head = self.language_model.get_output_embeddings()
        return linear_token_entropies(
            states,
            head.weight,
            bias=head.bias,
            temperature=self.temperature,
            chunk_bytes=self.token_logprobs.chunk_bytes,
        )


@torch.no_grad()
def head_is_linear(language_model: Any) -> bool:  # noqa: ANN401
    """True if the model's logits are its last hidden states times the head: no soft cap, no scaling.

    Tried on a few tokens rather than read from the configuration, whose names for it differ by architecture. The
    hidden states are enlarged on their way into the head, since a soft cap leaves small logits nearly as they are.
    """
    head = language_model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return False
    input_ids = torch.arange(4, device=head.weight.device)[None] % head.weight.shape[0]
    hidden = language_model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    enlarge = head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * ENLARGEMENT,))
    try:
        logits = language_model(input_ids=input_ids, use_cache=False).logits
    finally:
        enlarge.remove()
    expected = F.linear(hidden * ENLARGEMENT, head.weight, head.bias)
    return torch.allclose(expected, logits, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
