"""What rollouts need of the policy beside its weights."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor

from drpo_lightning.batch import Rollout


class RolloutPolicy(ABC):
    """A LightningModule whose objective asks for more than the sampled tokens' logprobs."""

    @property
    @abstractmethod
    def num_topk(self) -> int:
        """How many of mu's most likely tokens the objective needs at each place; 0 for none."""

    @property
    @abstractmethod
    def needs_proximal_logprobs(self) -> bool:
        """True if the objective needs log pi_prox of every sampled token."""

    @property
    @abstractmethod
    def needs_reference_logprobs(self) -> bool:
        """True if log pi_ref of every sampled token is asked for, of a frozen reference model."""

    @property
    def is_packed(self) -> bool:
        """True if the padding of a micro-batch costs nothing; micro-batches have as many tokens each then."""
        return False

    @abstractmethod
    def score(
        self, rollout: Rollout, *, batch_size: int, pad_token_id: int, by_reference: bool = False
    ) -> list[list[float]]:
        """Log pi of every sampled token of a rollout under the present weights, without a gradient.

        Collective under FSDP: every rank scores as many completions as the others.

        Args:
            rollout: the completions.
            batch_size: completions in one forward pass.
            pad_token_id: fills the rows of a batch.
            by_reference: True asks for log pi_ref, under the reference model.

        Returns:
            Logprobs in nats, one list per completion.
        """

    @abstractmethod
    def reference_penalties(self, rollout: Rollout) -> Float[Tensor, " samples"] | None:
        """What the divergence from the reference takes off each reward, in units of reward; None if it takes nothing.

        Args:
            rollout: the completions, with their `reference_logprobs`.
        """
