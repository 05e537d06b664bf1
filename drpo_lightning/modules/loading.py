"""A policy network on a rank: whole, or sharded without any rank ever holding the whole."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import Strategy
from lightning_utilities.core.rank_zero import rank_zero_info

from drpo_lightning.errors import SettingError
from drpo_lightning.modules.language_model import empty_language_model, load_language_model
from drpo_lightning.modules.logprob_backends import TokenLogprobs
from drpo_lightning.modules.packing_trial import why_not_packed
from drpo_lightning.modules.policy_network import PolicyNetwork, head_is_linear
from drpo_lightning.modules.sharding import fill, is_sharded, shard

Packing = Literal["auto", "always", "never"]


def load_network(
    name: str,
    strategy: Strategy,
    *,
    adapt: Callable[[Any], None],
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
    token_logprobs: TokenLogprobs = TokenLogprobs(),  # noqa: B008 - frozen
    packing: Packing = "auto",
    trust_remote_code: bool = False,
) -> PolicyNetwork:
    """Loads a causal language model as a policy network, on the CPU or, if it is sharded, on the rank's device.

    Under FSDP the first rank alone reads the checkpoint, in its own precision. Collective.

    Args:
        name: folder or hub name of the model.
        strategy: Lightning's strategy; called inside `configure_model`.
        adapt: changes the language model in place before it becomes a network; called with a model that has its
            weights or one whose parameters are on the meta device.
        dtype: precision of the parameters.
        temperature: see `PolicyNetwork`.
        token_logprobs: see `PolicyNetwork`.
        packing: whether the padding of batches is left out: `auto` where the model allows for it, which is tried.
        trust_remote_code: whether code that comes with the model may run.

    Returns:
        The network; under FSDP1 a wrapper around it.

    Raises:
        SettingError: if the model cannot be packed and must be.
    """

    def traits(language_model: Any) -> tuple[bool, str | None]:  # noqa: ANN401
        obstacle = "`model.packing` is never" if packing == "never" else why_not_packed(language_model)
        return head_is_linear(language_model), obstacle

    def network(language_model: Any, is_head_linear: bool, obstacle: str | None) -> PolicyNetwork:  # noqa: ANN401
        if packing != "never":
            _report_packing(name, obstacle, must_be_packed=packing == "always")
        return PolicyNetwork(
            language_model,
            temperature=temperature,
            token_logprobs=token_logprobs,
            is_head_linear=is_head_linear,
            is_packed=obstacle is None,
        )

    if not is_sharded(strategy):
        language_model = load_language_model(name, dtype=dtype, trust_remote_code=trust_remote_code)
        tried = traits(language_model)
        adapt(language_model)
        return network(language_model, *tried)
    source = None
    if strategy.is_global_zero:
        source = load_language_model(name, dtype="auto", trust_remote_code=trust_remote_code)
    tried = strategy.broadcast((False, None) if source is None else traits(source))
    if source is not None:
        adapt(source)
    empty = empty_language_model(name, dtype=dtype, trust_remote_code=trust_remote_code)
    adapt(empty)
    sharded = shard(network(empty, *tried), strategy)
    fill(sharded, None if source is None else source.state_dict())
    return sharded


def _report_packing(name: str, obstacle: str | None, *, must_be_packed: bool) -> None:
    """Says why a model is not packed, if it is not; raises `SettingError` if it must be."""
    if obstacle is None:
        return
    if must_be_packed:
        raise SettingError(f"`model.packing` always: {name} cannot be packed, {obstacle}; set it to auto")
    rank_zero_info(f"Packing: {name} is not packed, and computes the padding of micro-batches too: {obstacle}")
