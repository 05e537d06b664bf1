"""What a policy is to the rollouts: where weights come from, and what its own models say of samples."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule
from torch import Tensor

from drpo_lightning.batch import Rollout, RolloutBatch
from drpo_lightning.modules.checks import are_finite
from drpo_lightning.modules.lora import LoRA
from drpo_lightning.modules.policy_network import PolicyNetwork
from drpo_lightning.modules.reference import ReferenceModel, ReferencePenalty
from drpo_lightning.modules.sharding import full_tensors, local
from drpo_lightning.objectives import Objective
from drpo_lightning.rollout.adapters import adapter_weights, is_adapter_weight, merged_shapes, merged_weights
from drpo_lightning.rollout.policy import RolloutPolicy
from drpo_lightning.rollout.weights import WeightSource


class EngineSide(LightningModule, WeightSource, RolloutPolicy):
    """The part of `PolicyModule` that rollouts use.

    Attributes:
        objective: what is maximised.
        peft: settings of the adapters; None if all weights are trained.
        reference: settings of the reference; None without one.
        network: the policy; None until it is loaded.
        reference_model: the reference; None until it is loaded, and without one.
    """

    objective: Objective
    model_name: str
    peft: LoRA | None
    reference: ReferencePenalty | None
    network: PolicyNetwork | None
    reference_model: ReferenceModel | None

    @property
    def num_topk(self) -> int:
        """See `RolloutPolicy`."""
        return self.objective.num_topk

    @property
    def needs_proximal_logprobs(self) -> bool:
        """See `RolloutPolicy`."""
        return "proximal_logprobs" in self.objective.required_inputs

    @property
    def needs_reference_logprobs(self) -> bool:
        """See `RolloutPolicy`."""
        return self.reference is not None

    @property
    def is_packed(self) -> bool:
        """See `RolloutPolicy`."""
        assert self.network is not None, "configure_model comes first"
        return self.network.is_packed

    def reference_penalties(self, rollout: Rollout) -> Float[Tensor, " samples"] | None:
        """See `RolloutPolicy`."""
        return None if self.reference is None else self.reference.reward_penalties(rollout)

    @torch.no_grad()
    def score(
        self, rollout: Rollout, *, batch_size: int, pad_token_id: int, by_reference: bool = False
    ) -> list[list[float]]:
        """See `RolloutPolicy`."""
        policy = self.reference_model if by_reference else self
        assert policy is not None, "the reference is loaded by `configure_model` for a fit"
        result: list[list[float]] = []
        for start in range(0, len(rollout), batch_size):
            rows = list(range(start, min(start + batch_size, len(rollout))))
            batch = RolloutBatch.collate(
                rollout, rows, None, pad_token_id=pad_token_id, num_update_tokens=0, num_update_sequences=0
            )
            inputs = (batch.input_ids, batch.attention_mask, batch.completion_mask)
            with self.trainer.precision_plugin.forward_context():
                logprobs = policy(*(tensor.to(self.device) for tensor in inputs)).cpu()
            result += [row[mask].tolist() for row, mask in zip(logprobs, batch.completion_mask, strict=True)]
        return result

    def weight_shapes(self) -> dict[str, torch.Size]:
        """See `WeightSource`."""
        assert self.network is not None, "configure_model comes first"
        return merged_shapes(self.network.tensor_shapes)

    def weights_are_finite(self) -> bool:
        """See `WeightSource`."""
        finite = torch.tensor(are_finite([local(p).detach() for p in self.parameters()]), device=self.device)
        return bool(self.trainer.strategy.reduce(finite.float(), reduce_op="sum") == self.trainer.world_size)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `WeightSource`; sharded tensors are gathered one at a time, by layers under FSDP1."""
        assert self.network is not None, "configure_model comes first"
        weights = full_tensors(self.network)
        return weights if self.peft is None else merged_weights(weights, self.peft.scale)

    @property
    def adapter_config(self) -> dict[str, Any] | None:
        """See `WeightSource`."""
        if self.peft is None or self.peft.sync != "adapter":
            return None
        return self.peft.adapter_config(self.model_name)

    def named_adapter_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `WeightSource`."""
        assert self.network is not None, "configure_model comes first"
        return adapter_weights(full_tensors(self.network, is_adapter_weight))
