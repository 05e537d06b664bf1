"""What a run is about to do, and what it came to, in a few lines at its start and its end."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_only

from drpo_lightning.callbacks.export_policy import ExportPolicy
from drpo_lightning.datamodules import RolloutDataModule
from drpo_lightning.modules import PolicyModule


class RunSummary(Callback):
    """Prints what will be trained and how at the start; at the end the validation before and after, and the folders.

    At the start: the model and its size, strategy and precision, what computes logprobs and why, objective and its
    regime, engine, completions and updates per rollout, and at most how many tokens will be sampled.

    The validation before is Lightning's sanity check: set `trainer.num_sanity_val_steps: -1`. Without it, the first
    and the latest validation are compared, and a single one stands alone.
    """

    summarizes_run = True
    """The lines that a run says without a summary are left out, see `announce`."""

    def __init__(self) -> None:
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}
        self._first_step = 0
        self._last_step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints what is about to happen, on rank 0."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        log_dir = trainer.log_dir  # collective
        if isinstance(pl_module, PolicyModule) and isinstance(data, RolloutDataModule):
            lines = {**_model_lines(trainer, pl_module), **_data_lines(trainer, data), "logs": str(log_dir or "none")}
            _print("\n".join(f"{title + ':':11}{text}" for title, text in lines.items()) + "\n")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Keeps the first and the latest figures."""
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        if not self._first:
            self._first, self._first_step = metrics, trainer.global_step
        self._last, self._last_step = metrics, trainer.global_step

    def state_dict(self) -> dict[str, Any]:
        """The first and the latest figures, which a resumed run prints too."""
        return {"first": self._first, "last": self._last, "first_step": self._first_step, "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the figures of the run so far over."""
        self._first, self._first_step = state_dict["first"], state_dict["first_step"]
        self._last, self._last_step = state_dict["last"], state_dict["last_step"]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Prints the summary on rank 0."""
        log_dir = trainer.log_dir  # collective
        if not trainer.is_global_zero:
            return
        exported = [c.exported for c in trainer.callbacks if isinstance(c, ExportPolicy) and c.exported]  # type: ignore[attr-defined]
        lines = [f"{trainer.global_step} updates on {trainer.current_epoch} rollouts"]
        for label, key in (("reward", "val/reward/mean"), ("pass@1", "val/pass@1")):
            moments = ((self._first_step, self._first), (self._last_step, self._last))
            if figures := {step: metrics[key] for step, metrics in moments if key in metrics}:
                parts = [f"{value:.3f} {_moment(step, trainer.global_step)}" for step, value in figures.items()]
                since = trainer.global_step - max(figures)
                ending = f", {since} updates before the end" if since else ""
                lines.append(f"held-out {label}: {' -> '.join(parts)}{ending}")
        if log_dir:
            lines.append(f"logs:    {log_dir}")
        lines += [f"policy:  {folder}" for folder in exported]
        if log_dir:
            lines.append(f"look at: tensorboard --logdir '{Path(log_dir).parent}'")
        _print("\n" + "\n".join(lines))


@rank_zero_only
def _print(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def _model_lines(trainer: Trainer, module: PolicyModule) -> dict[str, str]:
    """The model, where and how it is trained, its logprobs, and the objective."""
    assert module.network is not None, "fit has begun"
    size = module.network.num_parameters
    adapters = "" if module.peft is None else f", LoRA of rank {module.peft.r}"
    ranks = f"{trainer.world_size} rank{'s' * (trainer.world_size > 1)} on {trainer.strategy.root_device.type}"
    return {
        "model": f"{module.model_name}, {_count(size)} parameters{adapters}",
        "strategy": f"{type(trainer.strategy).__name__}, {ranks}, {trainer.precision}",
        "logprobs": module.network.describe_logprobs(),
        "objective": module.objective.describe(),
        **({} if module.reference is None else {"reference": module.reference.describe()}),
    }


def _data_lines(trainer: Trainer, data: RolloutDataModule) -> dict[str, str]:
    """The engine, and what a rollout and the whole run sample and update."""
    tokens = data.num_prompts * data.group_size * data.sampling.max_tokens
    staleness = "staleness 0 (every rollout is of the newest weights)"
    if data.max_staleness:
        staleness = f"staleness at most {data.max_staleness} (rollouts are sampled while earlier ones are trained on)"
    return {
        "engine": data.engine.describe(),
        "rollout": f"{data.describe_rollout()}; completions of at most {data.sampling.max_tokens} tokens",
        "run": f"{_length(trainer, data, tokens)}, {staleness}",
    }


def _length(trainer: Trainer, data: RolloutDataModule, tokens: int) -> str:
    """How long a run will be, and what that takes at most."""
    updates = [trainer.max_steps] if trainer.max_steps != -1 else []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        updates.append(trainer.max_epochs * data.num_updates)
    if not updates:
        return f"no end set, at most {_count(tokens)} sampled tokens per rollout"
    rollouts = -(-min(updates) // data.num_updates)
    return f"{rollouts} rollouts, {min(updates)} updates, at most {_count(rollouts * tokens)} sampled tokens"


def _count(number: float) -> str:
    """A large number in short."""
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g} {letter}"
    return f"{number:g}"


def _moment(step: int, last_step: int) -> str:
    """When a validation was, in words."""
    if not step:
        return "before"
    return "after" if step == last_step else f"after {step} updates"
