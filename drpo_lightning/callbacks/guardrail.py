"""Stops a run, or slows it down, when a logged value says that it has gone wrong."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from drpo_lightning.callbacks.tensorboard import tensorboard_writers
from drpo_lightning.checkpoints import save_checkpoint
from drpo_lightning.errors import SettingError
from drpo_lightning.logs import log_interval, log_metrics


@dataclass(frozen=True)
class Rule:
    """Bounds of a logged value, both allowed; NaN violates them.

    Args:
        metric: name of the value in the logs.
        min: least value; None for no bound.
        max: largest value; None for no bound.

    Raises:
        ValueError: if there is no bound.
    """

    metric: str
    min: float | None = None
    max: float | None = None

    def __post_init__(self) -> None:
        if self.min is None and self.max is None:
            raise ValueError(f"the rule of `{self.metric}` must have a `min` or a `max`")

    def violation(self, value: float) -> str | None:
        """What is wrong with a value, in words; None if nothing is."""
        if self.min is not None and not value >= self.min:
            return f"{self.metric} {value:.4g} is not at least {self.min:g}"
        if self.max is not None and not value <= self.max:
            return f"{self.metric} {value:.4g} is not at most {self.max:g}"
        return None


DEFAULT_RULES = (
    Rule("mismatch/k3_kl", max=0.1),
    Rule("mismatch/pearson", min=0.9),
    Rule("entropy/rollout", min=0.01),
    Rule("sync/probe_logprob_diff", max=1.0),
)
LEARNING_RATES = ("lr", "initial_lr", "max_lr", "min_lr")
"""Entries of a parameter group that PyTorch's schedulers read learning rates from."""
SCHEDULER_LEARNING_RATES = {"base_lrs", "max_lrs", "eta_min"}
"""Entries of a scheduler's state that it computes learning rates from."""


class Guardrail(Callback):
    """Watches logged values and acts when one of them violates its rule.

    The rules by default; those of values that nothing logs are silent:

    - `mismatch/k3_kl` at most 0.1 nats: the KL divergence of the engine's distribution from the trainer's at the same
      weights, far below 0.01 for a sound engine in bfloat16. It grows before a collapse.
    - `mismatch/pearson` at least 0.9: the correlation of the two probabilities of the sampled tokens.
    - `entropy/rollout` at least 0.01 nats: below it the samples of a prompt are the same, and teach nothing.
    - `sync/probe_logprob_diff` at most 1 nat: the engine's weights are not the trainer's.

    A NaN or infinite loss or gradient is not for a rule: `PolicyModule` stops the run before such an update, or leaves
    it out, see `max_skipped_updates`.

    A rule is judged whenever its value is logged anew in training: before the next micro-batch, which is still
    trained, or at the end of the rollout. When it is violated `patience` times in succession, a warning says so,
    TensorBoard gets it as the text `guardrail` and the scalar `guardrail/triggered` (1), the state is kept as
    `guardrail-step=N.ckpt` in the run's log folder, and then

    - `stop` ends the training as after its last rollout, with a validation, even if `trainer.min_epochs` or
      `trainer.min_steps` asks for more. The command exits with status 0, and its last line is
      "Stopped by Guardrail after N updates: REASON. State: FILE".
    - `lower_learning_rate` multiplies the learning rates, present and scheduled, by `factor`, and goes on. The rule
      can act again after `patience` more violations. Schedules of PyTorch and transformers keep their shape.

    Args:
        rules: take the place of the default rules. At most one rule of a metric.
        action: `stop` or `lower_learning_rate`.
        factor: of the learning rate, in (0, 1).
        patience: violations in succession after which a rule acts.
        checkpoint: whether the state is kept.

    Raises:
        ValueError: if a setting is out of range.
        SettingError: after the first rollout, if the metric of a rule in `rules` has not been logged once by then. A
            name that starts with `val/` is not checked: there may be no validation yet.
    """

    def __init__(
        self,
        rules: list[Rule] | None = None,
        action: Literal["stop", "lower_learning_rate"] = "stop",
        factor: float = 0.5,
        patience: int = 1,
        checkpoint: bool = True,
    ) -> None:
        if action not in ("stop", "lower_learning_rate"):
            raise ValueError(f"`action` must be `stop` or `lower_learning_rate`, got {action!r}")
        if not 0 < factor < 1:
            raise ValueError(f"`factor` must be in (0, 1), got {factor}")
        if patience < 1:
            raise ValueError(f"`patience` must be at least 1, got {patience}")
        self.rules = list(DEFAULT_RULES if rules is None else rules)
        names = [rule.metric for rule in self.rules]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"`rules` has several rules of {repeated[0]!r}; give `min` and `max` in one")
        self.action = action
        self.factor = factor
        self.patience = patience
        self.checkpoint = checkpoint
        self.stopped: str | None = None
        """What stopped the run, and where its state is."""
        self._required = set() if rules is None else {name for name in names if not name.startswith("val/")}
        self._violations: dict[str, int] = {}
        """Violations in succession, by the metrics that have been logged so far."""
        self._latest: dict[str, Tensor] = {}
        self._first_step: int | None = None

    @property
    def state_key(self) -> str:
        """Tells a guardrail that stops from one that lowers the learning rate, in the checkpoint of a run with both."""
        return f"{type(self).__qualname__}({self.action})"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Forgets an earlier fit, but not the violations that a checkpoint has counted."""
        self.stopped, self._first_step, self._latest = None, None, {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ANN401, ARG002
        """Judges what was logged since the last micro-batch, by the module too: its hooks run after callbacks'."""
        self._judge(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judges what was logged last, so that no further rollout is sampled."""
        self._judge(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Checks, after the first whole rollout and before the next, that every rule has something to watch."""
        if self._first_step is None:
            self._first_step = trainer.global_step
        missing = sorted(self._required - trainer.callback_metrics.keys() - self._violations.keys())
        if missing and trainer.global_step - self._first_step >= log_interval(trainer):
            raise SettingError(
                f"`Guardrail` has a rule of {missing[0]!r}, which was not logged in the first rollout; list the "
                "callback that logs it, let it log at least once a rollout (`every_n_updates`), or correct the name. "
                f"There are {sorted(trainer.callback_metrics)}"
            )

    def _judge(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Acts if a value that was logged since the last call demands it. Collective."""
        values = self._new_values(trainer)
        if not values or self.stopped:
            return
        # Some values, such as times, differ between ranks: rank 0 decides, on what it writes to the logs.
        reasons = trainer.strategy.broadcast(self._reasons(values))
        if reasons:
            self._act(trainer, pl_module, "; ".join(reasons))

    def _new_values(self, trainer: Trainer) -> dict[str, float]:
        """The watched values that were logged since the last call."""
        metrics = trainer.callback_metrics
        watched = {name: metrics[name] for name in self._bounds if name in metrics}
        # Logging makes a new tensor; the old one is kept in `_latest`, so that its memory is not taken by the new one.
        new = {
            name: value
            for name, value in watched.items()
            if name not in self._latest or self._latest[name].data_ptr() != value.data_ptr()
        }
        self._latest |= new
        return {name: float(value) for name, value in new.items()}

    @property
    def _bounds(self) -> dict[str, Rule]:
        return {rule.metric: rule for rule in self.rules}

    def _reasons(self, values: dict[str, float]) -> list[str]:
        """Counts violations; those that were violated often enough, in words."""
        reasons = []
        for name in values.keys() & self._bounds.keys():
            violation = self._bounds[name].violation(values[name])
            self._violations[name] = self._violations.get(name, 0) + 1 if violation else 0
            if violation and self._violations[name] >= self.patience:
                self._violations[name] = 0
                reasons.append(violation + (f", {self.patience} times in succession" if self.patience > 1 else ""))
        return sorted(reasons)

    def _act(self, trainer: Trainer, pl_module: LightningModule, reason: str) -> None:
        """Reports the reason, keeps the state, and stops the run or lowers the learning rate."""
        stops = self.action == "stop"
        log_metrics(trainer, pl_module, {"guardrail/triggered": 1.0})
        kept = ""
        if self.checkpoint:
            path = Path(trainer.log_dir or trainer.default_root_dir) / f"guardrail-step={trainer.global_step}.ckpt"
            save_checkpoint(trainer, path)
            kept = f". State: {path}"
        action = "the run stops" if stops else f"the learning rate is multiplied by {self.factor:g}"
        message = f"Guardrail after {trainer.global_step} updates: {reason}; {action}{kept}"
        rank_zero_warn(message)
        for writer in tensorboard_writers(trainer):
            writer.add_text("guardrail", message, trainer.global_step)
        if not stops:
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            scale_learning_rates(trainer.optimizers, schedulers, self.factor)
            return
        self.stopped = f"after {trainer.global_step} updates: {reason}{kept}"
        trainer.should_stop = True
        trainer.fit_loop.min_epochs, trainer.fit_loop.epoch_loop.min_steps = 0, None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Says last why the run has stopped."""
        if stage == "fit" and self.stopped and trainer.is_global_zero:
            print(f"Stopped by Guardrail {self.stopped}", flush=True)  # noqa: T201

    def state_dict(self) -> dict[str, Any]:
        """Violations in succession, of the values that have been judged by now."""
        return {"violations": self._violations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on counting violations."""
        self._violations = dict(state_dict["violations"])


def scale_learning_rates(optimizers: Iterable[Optimizer], schedulers: Iterable[Any], factor: float) -> None:
    """Multiplies learning rates by a factor, now and in what the schedulers make of them from here on.

    Args:
        optimizers: their parameter groups are changed.
        schedulers: of these optimizers, PyTorch's or with the same keys in their state.
        factor: positive.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.update({name: group[name] * factor for name in LEARNING_RATES if name in group})
    for scheduler in schedulers:
        scheduler.load_state_dict(_scaled(scheduler.state_dict(), factor))


def _scaled(state: dict[str, Any], factor: float) -> dict[str, Any]:
    """A scheduler's state with its learning rates multiplied, those of schedulers that it is made of included."""
    scaled = dict(state)
    for name in SCHEDULER_LEARNING_RATES & state.keys():
        rates = state[name]
        scaled[name] = [rate * factor for rate in rates] if isinstance(rates, list) else rates * factor
    if "_schedulers" in state:
        scaled["_schedulers"] = [_scaled(part, factor) for part in state["_schedulers"]]
    return scaled
