"""Base of the callbacks that watch every token of an optimizer update."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from drpo_lightning.batch import RolloutBatch
from drpo_lightning.callbacks.tensorboard import write_histogram
from drpo_lightning.logs import log_interval, log_metrics
from drpo_lightning.metrics import TokenStatistics
from drpo_lightning.modules.policy import StepOutput


class CompletionTokens(NamedTuple):
    """The completion tokens of one micro-batch, packed into vectors.

    Attributes:
        token_ids: the sampled tokens.
        policy_logprobs: log pi, in nats.
        rollout_logprobs: log mu, in nats.
        advantages: A, in units of reward.
        grad_weight: w, NaN where A = 0.
        beyond_clamp: True where |log pi - log mu| > 20, which has no gradient.
        keep: True where the objective's mask keeps the token; None for an objective without a mask.
        proximal_logprobs: log pi_prox, in nats; None if it is not computed.
        reference_logprobs: log pi_ref, in nats; None without a reference.
    """

    token_ids: Int[Tensor, " tokens"]
    policy_logprobs: Float[Tensor, " tokens"]
    rollout_logprobs: Float[Tensor, " tokens"]
    advantages: Float[Tensor, " tokens"]
    grad_weight: Float[Tensor, " tokens"]
    beyond_clamp: Bool[Tensor, " tokens"]
    keep: Bool[Tensor, " tokens"] | None
    proximal_logprobs: Float[Tensor, " tokens"] | None
    reference_logprobs: Float[Tensor, " tokens"] | None = None


def completion_tokens(batch: RolloutBatch, outputs: StepOutput) -> CompletionTokens:
    """Picks the completion tokens out of a micro-batch and of what `training_step` returned for it."""
    places = batch.completion_mask.flatten().nonzero().squeeze(1)
    objective = outputs["objective"]

    def picked(values: Tensor) -> Tensor:
        return values.flatten()[places]

    def picked_if_given(values: Tensor | None) -> Tensor | None:
        return None if values is None else picked(values)

    return CompletionTokens(
        token_ids=picked(batch.input_ids),
        policy_logprobs=picked(outputs["policy_logprobs"]),
        rollout_logprobs=picked(batch.rollout_logprobs),
        advantages=picked(batch.advantages),
        grad_weight=picked(objective.grad_weight),
        beyond_clamp=picked(objective.beyond_clamp),
        keep=picked_if_given(objective.keep),
        proximal_logprobs=picked_if_given(batch.proximal_logprobs),
        reference_logprobs=picked_if_given(batch.reference_logprobs),
    )


class TokenValues(NamedTuple):
    """What the statistics of one micro-batch are taken of, `[tokens]` each.

    Attributes:
        values: by name.
        subsets: True on the tokens of a subset, by its name.
    """

    values: dict[str, Tensor]
    subsets: dict[str, Tensor]


class UpdateStatistics(Callback, ABC):
    """Gathers token statistics over the micro-batches and ranks of an optimizer update, and logs them after it.

    They are taken on the policy before the update: the first update of a rollout sees the weights that sampled it.

    Args:
        statistics: the metric to feed.
        every_n_updates: logs after every n-th optimizer step; by default as often as `trainer.log_every_n_steps`.
    """

    def __init__(self, statistics: TokenStatistics, every_n_updates: int | None = None) -> None:
        if every_n_updates is not None and every_n_updates < 1:
            raise ValueError(f"`every_n_updates` must be at least 1, got {every_n_updates}")
        self.statistics = statistics
        self.every_n_updates = every_n_updates
        self._logged_step = 0

    @abstractmethod
    def token_values(self, tokens: CompletionTokens) -> TokenValues:
        """The values that the metric is fed with."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the states to the device of the policy."""
        self.statistics.to(pl_module.device)
        self._logged_step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's signature; a StepOutput
        batch: RolloutBatch,
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Adds the micro-batch; logs if it completed an optimizer update."""
        interval = self.every_n_updates or log_interval(trainer)
        # The update that this micro-batch belongs to, counted from 1, whether or not it is complete by now.
        is_complete = trainer.global_step != self._logged_step
        update = trainer.global_step if is_complete else trainer.global_step + 1
        if update % interval == 0:
            self.statistics.update(*self.token_values(completion_tokens(batch, outputs)))
        if not is_complete:
            return
        self._logged_step = trainer.global_step
        if update % interval == 0:
            scalars, histograms = self.statistics.compute()
            self.statistics.reset()
            log_metrics(trainer, pl_module, scalars)
            for name, histogram in histograms.items():
                write_histogram(trainer, name, histogram)
