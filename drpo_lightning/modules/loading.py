"""A policy network on a rank: whole, or sharded without any rank ever holding the whole."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy

from drpo_lightning.modules.language_model import empty_language_model, load_language_model
from drpo_lightning.modules.logprob_backends import TokenLogprobs
from drpo_lightning.modules.policy_network import PolicyNetwork, head_is_linear
from drpo_lightning.modules.sharding import fill, is_sharded, shard


def load_network(
    name: str,
    strategy: Strategy,
    *,
    adapt: Callable[[Any], None],
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
    token_logprobs: TokenLogprobs = TokenLogprobs(),  # noqa: B008 - frozen
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
        trust_remote_code: whether code that comes with the model may run.

    Returns:
        The network; under FSDP1 a wrapper around it.
    """

    def network(language_model: Any, is_head_linear: bool) -> PolicyNetwork:  # noqa: ANN401
        return PolicyNetwork(
            language_model, temperature=temperature, token_logprobs=token_logprobs, is_head_linear=is_head_linear
        )

    if not is_sharded(strategy):
        language_model = load_language_model(name, dtype=dtype, trust_remote_code=trust_remote_code)
        is_linear = head_is_linear(language_model)
        adapt(language_model)
        return network(language_model, is_linear)
    source = None
    if strategy.is_global_zero:
        source = load_language_model(name, dtype="auto", trust_remote_code=trust_remote_code)
    is_linear = bool(strategy.broadcast(None if source is None else head_is_linear(source)))
    if source is not None:
        adapt(source)
    empty = empty_language_model(name, dtype=dtype, trust_remote_code=trust_remote_code)
    adapt(empty)
    sharded = shard(network(empty, is_linear), strategy)
    fill(sharded, None if source is None else source.state_dict())
    return sharded
