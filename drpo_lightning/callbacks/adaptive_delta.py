"""A trust-region radius that follows what the policy does."""

import dataclasses
import math
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from drpo_lightning.batch import RolloutBatch
from drpo_lightning.errors import SettingError
from drpo_lightning.functional import probability_shift
from drpo_lightning.logs import log_interval, log_metrics
from drpo_lightning.metrics import TokenStatistics, geometric_edges
from drpo_lightning.modules import PolicyModule
from drpo_lightning.modules.policy import StepOutput

Statistic = Literal["quantile", "corrective_fraction"]
DEFAULT_TARGETS = {"quantile": 0.2, "corrective_fraction": 0.01}
DIRECTIONS = {"quantile": -1.0, "corrective_fraction": 1.0}
"""Sign of the change of delta when the statistic is above its target, see `AdaptiveDelta`."""


class AdaptiveDelta(Callback):
    """Moves `delta` of the objective so that a statistic of the tokens of an update stays at a target.

    DRPO's paper leaves the choice of delta open. Here it follows from what is wanted of it. After an update

        log delta <- log delta + direction * gain * clip(log(measured / target), -1, 1)

    within `[min_delta, max_delta]`: by the factor e^gain at most. The direction follows from what delta does to a
    token that is pushed away from mu. Its shift grows by w = 1 - shift / delta per unit of push, so that after the
    push s, which is what the shift would be without a region,

        shift = delta (1 - exp(-s / delta))

    - `quantile`: the shift itself increases with delta, from 0 to s. A quantile of |pi - mu| above its target asks
      for a smaller delta (direction -1). This bounds how far a rollout's updates take the policy from mu. It holds
      while an optimizer step moves a token by less than delta: below that, corrections of up to 1/delta times the
      gradient overshoot, and the shift grows again. `min_delta` keeps away from there; if delta stays at it, lower the
      learning rate.
    - `corrective_fraction`: a token has w < 0 where its shift is beyond delta, by what other tokens or the finite step
      do to it. `shift / delta` decreases with delta, since the shift grows by less than delta does. Too many
      corrective tokens ask for a larger delta (direction +1). delta is then about the (1 - target) quantile of the
      shift, and follows it: this keeps the region at the edge of what the policy does, but does not hold the policy
      back. `max_delta` does.

    The first update of a rollout does not count: there pi = mu up to rounding, whatever delta is. The geometric mean
    over the others settles at the target, if a delta within the bounds can bring it there.

    Logs `adaptive/delta`, which the update was made with, and the statistic, over all micro-batches and ranks:
    `adaptive/abs_shift_p99` (quantile of |pi - mu|, units of probability; named after the quantile) or
    `adaptive/corrective_fraction` (share of w < 0 among tokens with A != 0). A resumed run goes on with the delta it
    had, whatever the objective's setting.

    Args:
        statistic: `quantile` of |pi - mu|, or `corrective_fraction`.
        target: value that the statistic is kept at; by default 0.2 for the quantile, 0.01 for the fraction.
        quantile: which quantile of |pi - mu|, in (0, 1).
        gain: largest change of log delta in an update; about how many updates it takes to settle is 1 / gain.
        min_delta: lower bound of delta, in units of probability.
        max_delta: upper bound of delta; from 1 on the boundary cannot be reached.

    Raises:
        ValueError: if a setting is out of range.
        SettingError: at the start, if the objective has no `delta` or one outside the bounds, or if a rollout has one
            update only.
    """

    def __init__(
        self,
        statistic: Statistic = "quantile",
        target: float | None = None,
        quantile: float = 0.99,
        gain: float = 0.05,
        min_delta: float = 0.05,
        max_delta: float = 12.5,
    ) -> None:
        if statistic not in DEFAULT_TARGETS:
            raise ValueError(f"`statistic` must be one of {sorted(DEFAULT_TARGETS)}, got {statistic!r}")
        target = DEFAULT_TARGETS[statistic] if target is None else target
        for name, value in (("target", target), ("quantile", quantile)):
            if not 0 < value < 1:
                raise ValueError(f"`{name}` must be in (0, 1), got {value}")
        if not gain > 0:
            raise ValueError(f"`gain` must be positive, got {gain}")
        if not 0 < min_delta < max_delta:
            raise ValueError(f"`min_delta` must be positive and less than `max_delta` {max_delta}, got {min_delta}")
        self.statistic = statistic
        self.target = target
        self.quantile = quantile
        self.gain = gain
        self.min_delta = min_delta
        self.max_delta = max_delta
        self._tokens = (
            TokenStatistics(quantiles={"adaptive/abs_shift": (geometric_edges(1e-6, 1.0), [quantile])})
            if statistic == "quantile"
            else TokenStatistics(means=["adaptive/corrective_fraction"])
        )
        self._resumed_delta: float | None = None
        self._delta = math.nan
        self._step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Checks that there is a delta to move."""
        if stage == "fit":
            objective = _policy(pl_module).objective
            check_objective(objective, self.min_delta, self.max_delta)
            if trainer.datamodule.num_updates < 2:  # type: ignore[attr-defined]
                raise SettingError(
                    "`AdaptiveDelta` needs `data.num_updates` of at least 2, got 1: in the first update of a rollout "
                    "pi = mu, whatever delta is"
                )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Goes on with the delta of a resumed run."""
        self._tokens.to(pl_module.device)
        self._step = trainer.global_step
        module = _policy(pl_module)
        if self._resumed_delta is not None:
            set_delta(module, self._resumed_delta)
        self._delta = module.objective.delta  # type: ignore[attr-defined]
        if trainer.num_training_batches <= int(trainer.accumulate_grad_batches):
            rank_zero_warn(
                "`AdaptiveDelta` never moves delta: `trainer.limit_train_batches` leaves one update a rollout"
            )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's signature; a StepOutput
        batch: RolloutBatch,
        batch_idx: int,
    ) -> None:
        """Adds the micro-batch; moves delta if it completed an optimizer update."""
        self._tokens.update(self._values(batch, outputs))
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        measured, _ = self._tokens.compute()
        self._tokens.reset()
        if self._step % log_interval(trainer) == 0:
            log_metrics(trainer, pl_module, {"adaptive/delta": self._delta, **measured})
        is_first_update = batch_idx < int(trainer.accumulate_grad_batches)  # an epoch is a rollout
        if measured and not is_first_update:
            (value,) = measured.values()
            self._delta = self.next_delta(self._delta, value)
            set_delta(_policy(pl_module), self._delta)

    def next_delta(self, delta: float, measured: float) -> float:
        """The delta after an update in which the statistic was `measured`, see the class."""
        error = math.log(measured / self.target) if measured > 0 else -math.inf
        change = DIRECTIONS[self.statistic] * self.gain * min(max(error, -1.0), 1.0)
        return min(max(delta * math.exp(change), self.min_delta), self.max_delta)

    def _values(self, batch: RolloutBatch, outputs: StepOutput) -> dict[str, Tensor]:
        """What the statistic is taken of, per completion token."""
        mask = batch.completion_mask
        if self.statistic == "quantile":
            shift = probability_shift(outputs["policy_logprobs"][mask], batch.rollout_logprobs[mask])
            return {"adaptive/abs_shift": shift.abs()}
        weight = outputs["objective"].grad_weight[mask]
        return {"adaptive/corrective_fraction": torch.where(weight.isnan(), torch.nan, (weight < 0).float())}

    def state_dict(self) -> dict[str, Any]:
        """The delta in use."""
        return {"delta": self._delta}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the delta for the start of the training."""
        self._resumed_delta = state_dict["delta"]


def check_objective(objective: object, min_delta: float, max_delta: float) -> None:
    """Raises `SettingError` unless the objective has a `delta` within the bounds."""
    names = [field.name for field in dataclasses.fields(objective)]  # type: ignore[arg-type]
    if "delta" not in names:
        raise SettingError(
            f"`AdaptiveDelta` moves `model.objective.delta`, and {type(objective).__name__} has only {names}; "
            "take an objective with a delta, such as DRPO"
        )
    delta = objective.delta  # type: ignore[attr-defined]
    if not min_delta <= delta <= max_delta:
        raise SettingError(
            f"`model.objective.delta` must be within `AdaptiveDelta`'s `min_delta` {min_delta:g} and `max_delta` "
            f"{max_delta:g}, got {delta:g}"
        )


def set_delta(module: PolicyModule, delta: float) -> None:
    """Gives a policy the same objective with another delta."""
    module.objective = dataclasses.replace(module.objective, delta=delta)  # type: ignore[type-var]


def _policy(pl_module: LightningModule) -> PolicyModule:
    if not isinstance(pl_module, PolicyModule):
        raise TypeError(f"the LightningModule must be a `PolicyModule`, got {type(pl_module).__name__}")
    return pl_module
