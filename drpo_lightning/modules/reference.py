"""The frozen reference model of an optional KL penalty: its settings, and the network behind log pi_ref."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, final

import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from drpo_lightning.batch import Rollout, RolloutBatch
from drpo_lightning.errors import SettingError
from drpo_lightning.functional.reference_kl import ESTIMATORS, Estimator, reference_kl, reference_penalty
from drpo_lightning.modules.loading import Packing, load_network
from drpo_lightning.modules.logprob_backends import TokenLogprobs
from drpo_lightning.modules.sharding import is_sharded

PLACEMENTS = ("loss", "reward")
GRADIENTS = {
    ("k1", True): "KL(pi || ref)",
    ("k3", True): "KL(pi || ref)",
    ("k1", False): "nothing, its mean is 0 on-policy",
    ("k3", False): "KL(ref || pi)",
}
"""What the gradient of an estimator in the loss is that of, by whether it is importance-weighted."""


@final
@dataclass(frozen=True)
class ReferencePenalty:
    """A penalty on the divergence of the policy from a frozen reference model, KL(pi || ref).

    In the loss, every token adds `beta r k` (`beta k` without `importance_weighted`), with its gradient: see
    `drpo_lightning.functional.reference_penalty` for what that is. In the reward, `beta` times the sum of k over a
    completion's tokens, of mu against ref and without a gradient, is taken off its reward before the advantages are;
    the reward that is logged stays without it. There k1 is the one whose policy gradient is that of KL(mu || ref), of
    the whole sequence; k3's is not.

    Args:
        beta: weight of the penalty, in units of reward per nat; 0 measures the divergence only.
        estimator: `k1` = log pi - log ref, or `k3` = ref / pi - 1 + log pi - log ref.
        placement: `loss` or `reward`.
        importance_weighted: multiplies by r = pi / mu in the loss, for an exact gradient of KL(pi || ref) whatever the
            weights were that sampled. False with `k3` is the penalty of GRPO.
        model: folder or hub name of the reference, with the tokenizer of the policy. By default the model that the
            training starts from; with LoRA that is the policy with its adapters switched off, and takes no memory.
        dtype: precision that the reference is kept in, `float32` or `bfloat16`; half the memory, but log pi_ref is off
            by what rounding its weights does. An adapted policy's base has the policy's precision.

    Raises:
        ValueError: if a setting is out of range, or `importance_weighted` is false for a penalty in the reward.
    """

    beta: float
    estimator: Estimator = "k3"
    placement: Literal["loss", "reward"] = "loss"
    importance_weighted: bool = True
    model: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if not 0 <= self.beta < float("inf"):
            raise ValueError(f"`reference.beta` must be 0 or positive, got {self.beta}")
        choices = {"estimator": ESTIMATORS, "placement": PLACEMENTS, "dtype": ("float32", "bfloat16")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`reference.{name}` must be one of {list(allowed)}, got {getattr(self, name)!r}")
        if self.placement == "reward" and not self.importance_weighted:
            raise ValueError(
                "`reference.importance_weighted` false is of no use in the reward, where mu itself is compared with "
                "the reference; leave it out, or set `reference.placement` to loss"
            )

    def describe(self) -> str:
        """One line for the start of a run: where the penalty is and what its gradient is that of."""
        name = self.model or "the model that the training starts from"
        if self.beta == 0:
            return f"divergence from {name} is measured, without a penalty"
        if self.placement == "reward":
            return f"{self.beta:g} per nat of {self.estimator} from {name} is taken off the rewards"
        weighted = "r " if self.importance_weighted else ""
        gradient = GRADIENTS[self.estimator, self.importance_weighted]
        return f"{self.beta:g} {weighted}{self.estimator} from {name} in the loss; its gradient is that of {gradient}"

    def token_penalties(
        self, policy_logprobs: Float[Tensor, "batch seq"], batch: RolloutBatch
    ) -> Float[Tensor, "batch seq"] | None:
        """What is added to the loss of each token, 0 outside the completions; None if nothing is.

        Raises:
            SettingError: if the batch comes from a rollout that was not scored by a reference.
        """
        if batch.reference_logprobs is None:
            raise SettingError(
                "`model.reference` was not set when the rollout of this checkpoint was made; resume without it, or "
                "from a checkpoint between rollouts"
            )
        if self.placement != "loss":
            return None
        return self.beta * reference_penalty(
            policy_logprobs,
            batch.rollout_logprobs,
            batch.reference_logprobs,
            batch.completion_mask,
            estimator=self.estimator,
            importance_weighted=self.importance_weighted,
        )

    def reward_penalties(self, rollout: Rollout) -> Float[Tensor, " samples"] | None:
        """What is taken off each completion's reward; None if nothing is."""
        if self.placement != "reward":
            return None
        assert rollout.reference_logprobs is not None, "a rollout is scored by the reference first"
        pairs = zip(rollout.completions, rollout.reference_logprobs, strict=True)
        sums = [
            reference_kl(_float64(completion.logprobs), _float64(reference), estimator=self.estimator).sum()
            for completion, reference in pairs
        ]
        return (self.beta * torch.stack(sums)).float()


def _float64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class ReferenceModel:
    """Log pi_ref of tokens, from a frozen network of its own or from the policy with its adapters switched off.

    Not an `nn.Module`: as a part of the policy's module its parameters would go to the optimizer and into checkpoints,
    DDP would broadcast them, and FSDP would gather them with the policy's. So nobody else moves it to a device.

    Args:
        network: the frozen network, or the adapted policy.
        is_adapted_policy: True if it is the policy, whose adapters make the difference.
    """

    def __init__(self, network: nn.Module, *, is_adapted_policy: bool = False) -> None:
        self.network = network
        self.is_adapted_policy = is_adapted_policy

    @torch.no_grad()
    def __call__(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Bool[Tensor, "batch seq"],
        completion_mask: Bool[Tensor, "batch seq"],
    ) -> Float[Tensor, "batch seq"]:
        """Log pi_ref of completion tokens, see `PolicyNetwork.forward`."""
        with adapters_disabled(self.network) if self.is_adapted_policy else nullcontext():
            return self.network(input_ids, attention_mask, completion_mask)  # type: ignore[no-any-return]


@contextmanager
def adapters_disabled(network: nn.Module) -> Iterator[None]:
    """Runs a network without its PEFT adapters: as the model that they were put into.

    Args:
        network: with layers that `peft` has put adapters into.

    Raises:
        ValueError: if it has none: the reference would be the policy itself.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    if not adapted:
        raise ValueError("the policy has no adapters to switch off, and would be its own reference")
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        for layer in adapted:
            layer.enable_adapters(False)
        # peft also freezes what it switches off, and FSDP2 makes its parameters in the first forward pass, as they are.
        for parameter in trained:
            parameter.requires_grad_(True)
        yield
    finally:
        for layer in adapted:
            layer.enable_adapters(True)


def load_frozen_network(
    name: str,
    strategy: Strategy,
    *,
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
    token_logprobs: TokenLogprobs = TokenLogprobs(),  # noqa: B008 - frozen
    packing: Packing = "auto",
    trust_remote_code: bool = False,
) -> nn.Module:
    """Loads a policy network without a gradient onto the rank's device, sharded as the policy is. Collective.

    Between forward passes FSDP1 keeps what stands outside the layers whole, such as the embedding.

    Args:
        name: folder or hub name of the model.
        strategy: Lightning's strategy; called inside `configure_model`.
        dtype: precision of the parameters.
        temperature: see `PolicyNetwork`.
        token_logprobs: see `PolicyNetwork`.
        packing: see `load_network`.
        trust_remote_code: whether code that comes with the model may run.
    """
    network = load_network(
        name,
        strategy,
        adapt=lambda language_model: language_model.requires_grad_(False).eval(),
        dtype=dtype,
        temperature=temperature,
        token_logprobs=token_logprobs,
        packing=packing,
        trust_remote_code=trust_remote_code,
    ).eval()
    if isinstance(network, FSDPModule):  # the outermost parameters would wait, whole, for a backward pass
        network.set_reshard_after_forward(True)
    return network if is_sharded(strategy) else network.to(strategy.root_device)
