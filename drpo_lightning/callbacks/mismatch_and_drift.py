"""Where the shift of pi against mu comes from: two engines that disagree, or a policy that has moved."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from drpo_lightning.batch import Rollout, RolloutBatch
from drpo_lightning.callbacks.sampled_completions import pass_size, spread_rows
from drpo_lightning.callbacks.update_statistics import completion_tokens
from drpo_lightning.logs import log_metrics
from drpo_lightning.metrics import LogprobComparison
from drpo_lightning.ranks import of_all_ranks
from drpo_lightning.rollout.hooks import RolloutHooks
from drpo_lightning.rollout.policy import RolloutPolicy


class MismatchAndDrift(Callback, RolloutHooks):
    """Splits the shift between pi and mu into the engines' mismatch and the policy's drift.

    `mismatch/<statistic>` compares pi_prox with mu: the same weights in the trainer and in the rollout engine. Of a
    sound engine it is small and steady. `drift/<statistic>` compares pi with pi_prox: the updates since the rollout, in
    the trainer alone. The statistics are those of `LogprobComparison`, in nats and units of probability.

    Mismatch is free: in the first update of a rollout pi is pi_prox, so it is taken over that update's tokens, of all
    ranks, and logged after every rollout's first update. For drift, a few completions of the rollout, spread evenly
    over it, are scored by the trainer without a gradient when they have been sampled, and again after the last update.

    Where rollouts are sampled ahead (`data.max_staleness`), mismatch is of the samples whose every token is of the
    newest weights. `staleness/<statistic>` compares pi_prox with mu on the others: mismatch, and the updates between
    the weights that sampled them and the newest ones.

    With an objective that needs log pi_prox of all tokens nothing more is scored, and both are taken over all tokens
    of, and logged after, every update; drift is then that before the update, 0 in the first of a rollout.

    Args:
        num_sequences: completions of each rank that are scored; 0 leaves drift out. By default one in 32, at least
            one. Two forward passes of n completions cost about 2 n / (3 N) of the updates on the N completions of a
            rank's rollout, 2 % by default.
        every_n_updates: scores also after every n-th optimizer step; by default after a rollout's last one only.

    Raises:
        ValueError: if a setting is out of range.
    """

    def __init__(self, num_sequences: int | None = None, every_n_updates: int | None = None) -> None:
        if num_sequences is not None and num_sequences < 0:
            raise ValueError(f"`num_sequences` must be 0 (no drift) or positive, got {num_sequences}")
        if every_n_updates is not None and every_n_updates < 1:
            raise ValueError(f"`every_n_updates` must be at least 1, got {every_n_updates}")
        self.num_sequences = num_sequences
        self.every_n_updates = every_n_updates
        self.statistics = {name: LogprobComparison() for name in ("mismatch", "staleness", "drift")}
        self._rows: list[int] = []
        self._proximal_logprobs = torch.empty(0)
        self._logged_step = 0
        self._rank, self._num_ranks = 0, 1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Notes which part of a checkpoint is this rank's."""
        self._rank, self._num_ranks = trainer.global_rank, trainer.world_size

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the states to the device of the policy."""
        for statistics in self.statistics.values():
            statistics.to(pl_module.device)
        self._logged_step = trainer.global_step

    def on_rollout_end(self, trainer: Trainer, pl_module: LightningModule, rollout: Rollout) -> None:
        """Scores a few completions with the weights that sampled them."""
        self._rows = [] if rollout.proximal_logprobs is not None else spread_rows(rollout, self.num_sequences)
        if self._rows:
            self._proximal_logprobs = score(trainer, pl_module, rollout, self._rows)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's signature; a StepOutput
        batch: RolloutBatch,
        batch_idx: int,
    ) -> None:
        """Adds the micro-batch; after an optimizer update, scores the completions again and logs."""
        is_first_update = batch_idx < int(trainer.accumulate_grad_batches)  # an epoch is a rollout
        if is_first_update or batch.proximal_logprobs is not None:
            tokens = completion_tokens(batch, outputs)
            pi, mu, proximal = tokens.policy_logprobs, tokens.rollout_logprobs, tokens.proximal_logprobs
            self._add_mismatch(trainer, batch, pi if proximal is None else proximal, mu)
            if proximal is not None:
                self.statistics["drift"].update(pi, proximal)
        if trainer.global_step == self._logged_step:
            return
        self._logged_step = trainer.global_step
        is_last_update = batch_idx + 1 >= trainer.num_training_batches
        if self._rows and (is_last_update or self._is_due(trainer.global_step)):
            rollout: Rollout = trainer.datamodule.rollout  # type: ignore[attr-defined]
            logprobs = score(trainer, pl_module, rollout, self._rows)
            self.statistics["drift"].update(logprobs.to(pl_module.device), self._proximal_logprobs.to(pl_module.device))
        if is_last_update:
            self._rows, self._proximal_logprobs = [], torch.empty(0)
        self._log(trainer, pl_module)

    def _add_mismatch(
        self, trainer: Trainer, batch: RolloutBatch, proximal: Float[Tensor, " tokens"], mu: Float[Tensor, " tokens"]
    ) -> None:
        """Adds a micro-batch's tokens to mismatch or staleness, on each rank to both: they are collective."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not getattr(data, "max_staleness", 0):  # another data module has none
            self.statistics["mismatch"].update(proximal, mu)
            return
        samples = (data.rollout.staleness > 0).to(mu.device)[batch.sample_ids]
        is_stale = samples[:, None].expand_as(batch.completion_mask)[batch.completion_mask]
        self.statistics["mismatch"].update(proximal[~is_stale], mu[~is_stale])
        self.statistics["staleness"].update(proximal[is_stale], mu[is_stale])

    def _is_due(self, step: int) -> bool:
        return self.every_n_updates is not None and step % self.every_n_updates == 0

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs what has been measured since the last time. Collective: every rank has measured the same things."""
        for name, statistics in self.statistics.items():
            if statistics.update_called:
                if found := statistics.compute():
                    log_metrics(trainer, pl_module, {f"{name}/{key}": x for key, x in found.items()})
                statistics.reset()

    def state_dict(self) -> dict[str, Any]:
        """The completions in use and their log pi_prox, of every rank. Collective over ranks."""
        mine = {"rows": self._rows, "proximal_logprobs": self._proximal_logprobs}
        return {"ranks": of_all_ranks(mine, self._num_ranks)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up this rank's part of `state_dict`, in the middle of a rollout."""
        mine = state_dict["ranks"][self._rank]
        self._rows, self._proximal_logprobs = mine["rows"], mine["proximal_logprobs"]


def score(trainer: Trainer, pl_module: LightningModule, rollout: Rollout, rows: list[int]) -> Float[Tensor, " tokens"]:
    """Log pi of the tokens of some completions under the present weights, in nats, on the host.

    A forward pass is no larger than a micro-batch of the training. Collective under FSDP: every rank asks for as many
    completions.

    Args:
        trainer: with a `RolloutDataModule`.
        pl_module: the policy.
        rollout: this rank's rollout.
        rows: which completions of it.
    """
    if not isinstance(pl_module, RolloutPolicy):
        raise TypeError(f"the LightningModule must be a `RolloutPolicy`, got {type(pl_module).__name__}")
    logprobs = pl_module.score(
        part_of_rollout(rollout, rows),
        batch_size=pass_size(trainer, rollout),
        pad_token_id=trainer.datamodule.encoder.pad_token_id,  # type: ignore[attr-defined]
    )
    return torch.tensor([logprob for completion in logprobs for logprob in completion])


def part_of_rollout(rollout: Rollout, rows: list[int]) -> Rollout:
    """Some completions of a rollout with their prompts; what else belongs to them is left out."""
    return replace(
        rollout,
        prompts=[rollout.prompts[row] for row in rows],
        prompt_ids=[rollout.prompt_ids[row] for row in rows],
        completions=[replace(rollout.completions[row], topk_ids=None, topk_logprobs=None) for row in rows],
        texts=[rollout.texts[row] for row in rows],
        columns={},
        rewards=rollout.rewards[rows],
        reward_parts={},
        reward_errors={},
        reward_timeouts={},
        prompt_numbers=[],
        proximal_logprobs=None,
        reference_logprobs=None,
        reference_penalties=None,
    )
