"""How fast the updates on a rollout were, and what a training has taken so far."""

import resource
import sys
import time
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule, Trainer

from drpo_lightning.batch import Rollout
from drpo_lightning.metrics.model_flops import TERA, model_size, peak_flops, product_dtype
from drpo_lightning.modules import PolicyModule


@dataclass(frozen=True)
class UpdateWork:
    """What the updates on a rollout have to do, over all ranks.

    Args:
        num_tokens: tokens of prompts and completions that are trained on, without padding.
        model_flops: operations that they take, see `ModelSize.training_flops`; None where that is not known.
        peak_flops: operations per second that all ranks' devices can do at best; None where that is not known.
    """

    num_tokens: float
    model_flops: float | None
    peak_flops: float | None

    def metrics(self, update_seconds: float) -> dict[str, float]:
        """`perf/update_tokens_per_second` and, where work and peak are known, `perf/mfu`.

        Args:
            update_seconds: what the updates took.
        """
        metrics = {"perf/update_tokens_per_second": self.num_tokens / update_seconds}
        if self.model_flops is not None and self.peak_flops is not None:
            metrics["perf/mfu"] = self.model_flops / (update_seconds * self.peak_flops)
        return metrics


def update_work(
    trainer: Trainer, pl_module: LightningModule, rollout: Rollout, peak_tflops: float | None = None
) -> UpdateWork:
    """Counts the work of the updates on a rollout. Collective.

    Args:
        trainer: knows the ranks, the precision, and how much of a rollout is trained on.
        pl_module: the policy; of another module than `PolicyModule` only the tokens are known.
        rollout: this rank's.
        peak_tflops: of one rank's device; by default that of `PEAK_TFLOPS`.
    """
    completions = torch.tensor([len(c.token_ids) for c in rollout.completions], dtype=torch.float64)
    sequences = torch.tensor(rollout.lengths, dtype=torch.float64)
    sums = torch.stack([sequences.sum(), completions.sum(), sequences.square().sum()]).to(pl_module.device)
    # `overfit_batches` trains on the first micro-batches of each rollout alone.
    micro_batches = trainer.datamodule.num_updates * trainer.accumulate_grad_batches  # type: ignore[attr-defined]
    trained = min(1.0, trainer.num_training_batches / micro_batches)
    tokens, head_tokens, squares = (trained * trainer.strategy.reduce(sums, reduce_op="sum")).tolist()
    network = pl_module.network if isinstance(pl_module, PolicyModule) else None
    size = None if network is None else model_size(network.language_model, network.tensor_shapes)
    flops = None
    if size is not None:
        flops = size.training_flops(num_tokens=tokens, num_head_tokens=head_tokens, squared_lengths=squares)
    peak = _peak_of_a_rank(trainer) if peak_tflops is None else peak_tflops * TERA
    return UpdateWork(tokens, flops, None if peak is None else peak * trainer.world_size)


def _peak_of_a_rank(trainer: Trainer) -> float | None:
    device = trainer.strategy.root_device
    if device.type != "cuda":
        return None
    return peak_flops(torch.cuda.get_device_name(device), product_dtype(trainer.precision))


def cost_so_far(trainer: Trainer, started: float) -> dict[str, float]:
    """`perf/elapsed_seconds` and `perf/peak_memory_gib`, see `RolloutStatistics`. Collective.

    Args:
        trainer: knows the ranks.
        started: when the training began, by `time.perf_counter`.
    """
    device = trainer.strategy.root_device
    peak = torch.tensor(_peak_memory_bytes(device) / 2**30, dtype=torch.float64, device=device)
    return {
        "perf/elapsed_seconds": time.perf_counter() - started,
        "perf/peak_memory_gib": float(trainer.strategy.reduce(peak, reduce_op="max")),
    }


def _peak_memory_bytes(device: torch.device) -> int:
    """Most memory of this process so far: what PyTorch has allocated on a CUDA GPU, or else resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
