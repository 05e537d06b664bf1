"""What a rollout brought: rewards, lengths, groups without a signal, and how long it took."""

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from drpo_lightning.batch import Rollout
from drpo_lightning.callbacks.throughput import UpdateWork, cost_so_far, update_work
from drpo_lightning.logs import log_interval, log_metrics
from drpo_lightning.rollout.engine import RolloutEngine
from drpo_lightning.rollout.hooks import RolloutHooks


class RolloutStatistics(Callback, RolloutHooks):
    """Logs every rollout, at the optimizer steps that were completed when it was sampled.

    `rollout/number` (from 1), `reward/mean`, `reward/std`, `reward/<name>/mean` (over completions that the reward
    applies to), `reward/<name>/applies_fraction`, for rewards that may fail `reward/<name>/error_fraction`,
    `reward/<name>/timeout_fraction` and `reward/dropped_fraction` (of all completions; the other rewards' figures leave
    dropped ones out), `reward/reference_kl/mean` (what the penalty on the divergence from a reference adds to the
    rewards before the advantages are taken, if there is one in the reward: minus beta times nats; no other figure here
    has it), `completions/mean_length` (tokens), `completions/max_length`, `completions/truncated_fraction`,
    `group/zero_std_fraction` (prompts whose samples, without dropped ones, have equal rewards and so no gradient, but
    for that of a penalty); and of the iteration `perf/generate_seconds`, `perf/sync_seconds`, `perf/reward_seconds`,
    `perf/update_seconds`, where there is such a thing `perf/wake_seconds` and `perf/sleep_seconds` of the engine,
    `perf/offload_seconds` of the optimizer's state and `perf/score_seconds` of forward passes before the first update,
    and `perf/iteration_seconds` (all but `perf/start_seconds`, which the engine takes to start where it does),
    `perf/tokens_per_second` (the completions' tokens over the whole iteration, all ranks), `perf/idle_fraction` (share
    of the iteration in which the trainer waits for completions; where they are sampled ahead, `perf/generate_seconds`
    is what is left to wait), of an engine in a process of its own `perf/engine_busy_fraction` (share of the iteration
    in which rank 0's computes tokens, of whichever rollout), `perf/generate_tokens_per_second` (sampled tokens over
    `perf/generate_seconds`, where they are not sampled ahead), `perf/update_tokens_per_second` (prompts and
    completions, without padding, over `perf/update_seconds`) and, for a dense transformer on a device whose peak is
    known, `perf/mfu` (model FLOPs utilization of the updates: see `ModelSize.training_flops` for what is counted,
    `PEAK_TFLOPS` for the peaks); `perf/token_imbalance` and `perf/padding_fraction` (what the split into micro-batches
    loses, see `drpo_lightning.datamodules.micro_batches.split_rollout`); `perf/elapsed_seconds` (since this start of
    the training, validations included; a resumed run begins at 0) and `perf/peak_memory_gib` (of any rank's process so
    far: what PyTorch has allocated on a CUDA GPU, or else resident memory); how old the weights of the samples are:
    `rollout/staleness_mean`, `rollout/staleness_max` (weight syncs between the oldest weights that a completion was
    drawn with and the newest synced ones) and, at updates, `rollout/updates_since_sync` (updates on this rollout so
    far); where prompts without a signal are replaced (`data.dynamic_sampling_rounds`), of which all other figures know
    nothing but the seconds, `dynamic_sampling/rounds`, `dynamic_sampling/discarded_fraction` (of the prompts that were
    sampled), `dynamic_sampling/discarded_tokens`, `dynamic_sampling/seconds` (of the sampling and scoring of the
    replacements) and `dynamic_sampling/reward_mean` (of all that was sampled: the prompts are not chosen by it);
    `engine/restarts`, how often so far an engine that had failed was started again, where one can be; and what an
    engine says of itself: `VLLMServerEngine` has `engine/servers` (that have the newest weights), `engine/lost_servers`
    and `engine/retried_requests` (so far), as rank 0 sees them.

    `drpo fit` has it also where the configuration does not name it.

    Args:
        peak_tflops: what one rank's device can do at best, in 10^12 operations per second, for `perf/mfu`; by default
            the vendor's figure for a GPU that `PEAK_TFLOPS` has. For other devices measure a large matrix product.

    Raises:
        ValueError: if it is not positive.
    """

    def __init__(self, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and not peak_tflops > 0:
            raise ValueError(f"`peak_tflops` must be positive, got {peak_tflops}")
        self.peak_tflops = peak_tflops
        self._metrics: dict[str, float] = {}
        self._tokens = 0.0
        self._work: UpdateWork | None = None
        self._began = 0.0
        self._started = 0.0
        self._sampled = 0.0
        self._updated = 0.0
        self._waited_seconds = 0.0
        self._engine_seconds: list[float | None] = [None, None]
        """For how long the engine had computed by the start of the iteration, and by the end of its updates."""
        self._last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Begins to count updates and time."""
        self._began = time.perf_counter()
        self._last_step = trainer.global_step

    def on_rollout_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Starts the clock of the iteration."""
        self._started = time.perf_counter()
        self._engine_seconds[0] = trainer.datamodule.engine.sampling_seconds  # type: ignore[attr-defined]

    def on_rollout_end(self, trainer: Trainer, pl_module: LightningModule, rollout: Rollout) -> None:
        """Takes the statistics over all ranks."""
        self._sampled = time.perf_counter()
        self._metrics = rollout_metrics(trainer, pl_module, rollout)
        self._tokens = self._metrics.pop("tokens")
        phases: dict[str, float] = trainer.datamodule.phase_seconds  # type: ignore[attr-defined]
        self._started += phases.get("start", 0.0)
        self._waited_seconds = phases["generate"]
        self._metrics |= {f"perf/{name}_seconds": seconds for name, seconds in phases.items()}
        resampled: dict[str, float] = trainer.datamodule.dynamic_sampling_statistics  # type: ignore[attr-defined]
        self._metrics |= {f"dynamic_sampling/{name}": value for name, value in resampled.items()}
        if trainer.datamodule.max_staleness == 0:  # type: ignore[attr-defined]
            sampled = self._tokens + resampled.get("discarded_tokens", 0.0)
            self._metrics["perf/generate_tokens_per_second"] = sampled / phases["generate"]
        self._work = update_work(trainer, pl_module, rollout, self.peak_tflops)
        engine: RolloutEngine = trainer.datamodule.engine  # type: ignore[attr-defined]
        if engine.max_restarts:
            self._metrics["engine/restarts"] = engine.num_restarts
        self._metrics |= {f"engine/{name}": value for name, value in engine.statistics.items()}
        self._metrics["rollout/number"] = trainer.datamodule.iteration  # type: ignore[attr-defined]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ANN401, ARG002
        """Logs the rollout that the first of its micro-batches comes from: the loader itself must not log."""
        if self._metrics:
            log_metrics(trainer, pl_module, self._metrics)
            self._metrics = {}

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401, ARG002
        batch: Any,  # noqa: ANN401, ARG002
        batch_idx: int,
    ) -> None:
        """Stops the clock of the updates: a validation may come before the end of the epoch. Counts them."""
        self._updated = time.perf_counter()
        self._engine_seconds[1] = trainer.datamodule.engine.sampling_seconds  # type: ignore[attr-defined]
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        if self._last_step % log_interval(trainer) == 0:
            updates = -(-(batch_idx + 1) // int(trainer.accumulate_grad_batches))
            log_metrics(trainer, pl_module, {"rollout/updates_since_sync": updates})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the speed of the iteration."""
        if self._work is None:
            return
        seconds, update_seconds = self._updated - self._started, self._updated - self._sampled
        metrics = {
            "perf/update_seconds": update_seconds,
            "perf/iteration_seconds": seconds,
            "perf/tokens_per_second": self._tokens / seconds,
            **self._work.metrics(update_seconds),
            "perf/idle_fraction": self._waited_seconds / seconds,
        }
        before, after = self._engine_seconds
        if before is not None and after is not None:
            metrics["perf/engine_busy_fraction"] = (after - before) / seconds
        lost: dict[str, float] = trainer.datamodule.split_statistics  # type: ignore[attr-defined]
        metrics |= {f"perf/{name}": value for name, value in lost.items()} | cost_so_far(trainer, self._began)
        log_metrics(trainer, pl_module, metrics)


def rollout_metrics(trainer: Trainer, pl_module: LightningModule, rollout: Rollout) -> dict[str, float]:
    """Statistics of a rollout over all ranks; `tokens` is the number of sampled tokens. Collective."""
    is_kept = rollout.is_kept
    rewards = rollout.rewards.double()[is_kept]
    lengths = torch.tensor([len(completion.token_ids) for completion in rollout.completions], dtype=torch.float64)
    sums: dict[str, Any] = {
        "completions": len(rollout),
        "samples": len(rewards),
        "groups": len(rollout) // rollout.group_size,
        "reward": rewards.sum(),
        "reward_squares": rewards.square().sum(),
        "tokens": lengths.sum(),
        "truncated": sum(completion.is_truncated for completion in rollout.completions),
        "staleness": rollout.staleness.sum(),
        "equal_groups": rollout.has_equal_rewards.sum(),
    }
    for name, scores in rollout.reward_parts.items():
        sums[f"{name}/sum"] = scores[is_kept].double().nansum()
        sums[f"{name}/count"] = (~scores[is_kept].isnan()).sum()
    for name, errors in rollout.reward_errors.items():
        sums[f"{name}/errors"], sums[f"{name}/timeouts"] = errors.sum(), rollout.reward_timeouts[name].sum()
    if rollout.reference_penalties is not None:
        sums["reference_kl"] = -rollout.reference_penalties[is_kept].double().sum()
    device = pl_module.device
    packed = torch.tensor([float(value) for value in sums.values()], dtype=torch.float64, device=device)
    totals = dict(zip(sums, trainer.strategy.reduce(packed, reduce_op="sum").tolist(), strict=True))
    longest, oldest = (
        float(trainer.strategy.reduce(values.max().to(device), reduce_op="max"))
        for values in (lengths, rollout.staleness.double())
    )
    completions = totals["completions"]
    metrics = {
        "completions/mean_length": totals["tokens"] / completions,
        "completions/max_length": longest,
        "completions/truncated_fraction": totals["truncated"] / completions,
        "group/zero_std_fraction": totals["equal_groups"] / totals["groups"],
        "rollout/staleness_mean": totals["staleness"] / completions,
        "rollout/staleness_max": oldest,
        "tokens": totals["tokens"],
    }
    for name in rollout.reward_errors:
        metrics[f"reward/{name}/error_fraction"] = totals[f"{name}/errors"] / completions
        metrics[f"reward/{name}/timeout_fraction"] = totals[f"{name}/timeouts"] / completions
        metrics["reward/dropped_fraction"] = 1 - totals["samples"] / completions
    return metrics | _kept_metrics(rollout, totals)


def _kept_metrics(rollout: Rollout, totals: dict[str, float]) -> dict[str, float]:
    """Figures of the samples that are not dropped; none if all are."""
    samples = totals["samples"]
    if not samples:
        return {}
    mean = totals["reward"] / samples
    metrics = {
        "reward/mean": mean,
        "reward/std": max(totals["reward_squares"] / samples - mean**2, 0.0) ** 0.5,
    }
    for name in rollout.reward_parts:
        count = totals[f"{name}/count"]
        metrics[f"reward/{name}/applies_fraction"] = count / samples
        if count:
            metrics[f"reward/{name}/mean"] = totals[f"{name}/sum"] / count
    if "reference_kl" in totals:
        metrics["reward/reference_kl/mean"] = totals["reference_kl"] / samples
    return metrics
