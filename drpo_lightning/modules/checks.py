"""What a policy cannot be trained with is refused before anything is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import Tensor

from drpo_lightning.batch import Sampling
from drpo_lightning.errors import SettingError
from drpo_lightning.modules.sharding import local
from drpo_lightning.objectives import Objective

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-mixed")
REFUSED_CALLBACKS: dict[type[Callback], str] = {
    GradientAccumulationScheduler: "rollouts are split into micro-batches in one way for the whole run; set "
    "`trainer.accumulate_grad_batches`",
    StochasticWeightAveraging: "it copies the policy before there is one, and averages nothing; take "
    "lightning.pytorch.callbacks.EMAWeightAveraging",
    BatchSizeFinder: "there is no batch size; set `trainer.accumulate_grad_batches`, which splits updates into "
    "micro-batches",
    LearningRateFinder: "the loss of a policy gradient does not say how good the policy is; set `model.optimizer`'s lr",
}
"""Callbacks of Lightning that cannot work here: why, and what to take instead."""


def check_model_folder(model: str) -> None:
    """Raises `ValueError` if `model` is a folder without a model in it, or looks like a path and is none."""
    path = Path(model)
    if not path.is_dir():
        if model.startswith(("/", ".", "~")) or model.count("/") > 1:
            raise ValueError(f"`model` {model!r} is no folder; a name on the Hugging Face hub is written `owner/name`")
        return
    if not (path / "config.json").is_file():
        raise ValueError(f"`model` {model!r} has no config.json: it is no folder of a transformers model")
    if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
        raise ValueError(f"`model` {model!r} has no weights: no *.safetensors or pytorch_model*.bin in it")


def check_strategy(strategy: Strategy) -> None:
    """Raises `SettingError` for a strategy or a device that the policy cannot be trained with."""
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FSDPStrategy | ModelParallelStrategy):
        raise SettingError(
            f"`trainer.strategy` {type(strategy).__name__} is not supported; take `ddp`, or "
            "lightning.pytorch.strategies.ModelParallelStrategy, which shards the policy by FSDP2, or `fsdp`"
        )
    if isinstance(strategy, FSDPStrategy) and not strategy.kwargs.get("use_orig_params"):
        raise SettingError(
            "`trainer.strategy` FSDPStrategy with `use_orig_params: false` is not supported: parameters without a name "
            "cannot be given to the engine; leave the setting out"
        )
    if isinstance(strategy, FSDPStrategy) and strategy.mixed_precision is not None:
        raise SettingError(
            "`trainer.strategy` FSDPStrategy with `mixed_precision` is not supported: it rounds gradients and rotary "
            "embeddings; leave it out and set `trainer.precision`"
        )
    if strategy.root_device.type == "mps":
        raise SettingError(
            "`trainer.accelerator` mps is not supported, since it has no float64; set `trainer.accelerator: cpu`"
        )


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Raises `SettingError` for a callback of Lightning that cannot work with rollouts."""
    for callback in callbacks:
        for refused, reason in REFUSED_CALLBACKS.items():
            if isinstance(callback, refused):
                raise SettingError(f"`trainer.callbacks` {refused.__name__} is not supported: {reason}")


def check_precision(precision: str) -> None:
    """Raises `SettingError` for a precision of the trainer that the objective's statistics would suffer from."""
    if precision not in PRECISIONS:
        raise SettingError(
            f"`trainer.precision` {precision} is not supported; take one of {', '.join(PRECISIONS)}: bf16-mixed where "
            "memory or speed matters, and 32-true elsewhere"
        )


def check_optimizer(optimizer: torch.optim.Optimizer, precision: str) -> None:
    """Raises `SettingError` for an optimizer whose gradients cannot be clipped, nor their norm logged, in float16."""
    if precision == "16-mixed" and any(group.get("fused") for group in optimizer.param_groups):
        raise SettingError(
            "`model.optimizer` with `fused: true` takes the loss scale off the gradient inside its step: with "
            "`trainer.precision` 16-mixed it would be clipped and logged with it; leave `fused` out"
        )


def check_optimizer_settings(make_optimizer: OptimizerCallable, make_lr_scheduler: LRSchedulerCallable | None) -> None:
    """Makes optimizer and schedule of one parameter: raises `SettingError` if they refuse their settings."""
    setting = "optimizer"
    try:
        optimizer = make_optimizer([torch.nn.Parameter(torch.zeros(2, 2))])
        setting = "lr_scheduler"
        if make_lr_scheduler is not None:
            make_lr_scheduler(optimizer)
    except (ValueError, TypeError) as error:
        raise SettingError(f"`model.{setting}` cannot be made: {error}") from error


def check_trainer(trainer: Trainer) -> None:
    """Raises `SettingError` for numbers that Lightning takes and that mean nothing."""
    if (trainer.accumulate_grad_batches or 0) < 1:  # null passes the parser
        raise SettingError(
            "`trainer.accumulate_grad_batches` must be at least 1, the micro-batches of an update, got "
            f"{trainer.accumulate_grad_batches}"
        )
    if trainer.gradient_clip_val is not None and not trainer.gradient_clip_val >= 0:
        raise SettingError(
            f"`trainer.gradient_clip_val` must be 0 (no clipping) or positive, got {trainer.gradient_clip_val}"
        )


def check_adapters(strategy: Strategy, num_ranks: int) -> None:
    """Raises `SettingError` for a strategy that adapters cannot be trained with."""
    if isinstance(strategy, FSDPStrategy) and num_ranks == 1:
        raise SettingError(
            "`trainer.strategy` FSDPStrategy on one rank does not work with `model.peft`, since FSDP1 does not shard "
            "there and cannot hold frozen weights; take `auto`, or ModelParallelStrategy"
        )


def parameter_dtype(precision: str) -> torch.dtype:
    """Precision that parameters are kept in: float32 but for `bf16-true`, since small updates round away below."""
    return torch.bfloat16 if precision == "bf16-true" else torch.float32


def check_mesh(mesh: Any, world_size: int) -> None:  # noqa: ANN401
    """Raises `SettingError` unless all ranks share the data: by default Lightning makes them tensor-parallel."""
    size = mesh["data_parallel"].size()
    if size != world_size:
        raise SettingError(
            f"`trainer.strategy` shares the data among {size} of {world_size} ranks, and the others would train on "
            f"their own; set its init_args to data_parallel_size: {world_size}, tensor_parallel_size: 1"
        )


def check_sampling(sampling: Sampling, objective: Objective, temperature: float) -> None:
    """Checks that mu, the distribution that is sampled from, is one that pi can be compared with.

    Raises:
        SettingError: if not, naming the setting.
    """
    if sampling.temperature != temperature:
        raise SettingError(
            f"`model.temperature` {temperature} must equal `data.sampling.temperature` {sampling.temperature}: "
            "pi is compared with the distribution that was sampled from"
        )
    if objective.uses_importance_ratio and not sampling.is_full_distribution:
        raise SettingError(
            f"`data.sampling` top_p={sampling.top_p}, top_k={sampling.top_k} renormalises mu to a part of the "
            f"vocabulary, and {type(objective).__name__} divides by it; set top_p: 1.0 and top_k: 0"
        )


@torch.no_grad()
def fraction_rounded_away(parameters: list[Tensor], step: float) -> float:
    """Share of bfloat16 parameters that do not change when `step` is added; 0 without such parameters."""
    coarse = [local(p).flatten()[:10_000] for p in parameters if p.dtype == torch.bfloat16]
    if not coarse:
        return 0.0
    values = torch.cat(coarse)
    return (values + step == values).float().mean().item()


def are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no value is NaN or infinite.

    A sum with such a value in it is never finite, and takes a tenth of the time of looking at each on a CPU. A sum of
    finite values that overflows is looked at closely.
    """
    sums = torch.stack([tensor.sum().float() for tensor in tensors])
    return bool(sums.isfinite().all()) or all(bool(tensor.isfinite().all()) for tensor in tensors)
