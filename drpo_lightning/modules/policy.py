"""The LightningModule: owns the policy, its objective and its optimizer."""

import math
import os
from collections.abc import Iterator
from typing import Any, Literal, TypedDict

import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from drpo_lightning.batch import Rollout, RolloutBatch, ValidationBatch
from drpo_lightning.errors import SettingError
from drpo_lightning.functional.aggregation import aggregate_loss
from drpo_lightning.functional.divergences import TopKLogprobs
from drpo_lightning.logs import log_interval, log_metrics
from drpo_lightning.metrics import ValidationStatistics
from drpo_lightning.modules.checks import (
    check_mesh,
    check_model_folder,
    check_precision,
    check_sampling,
    check_strategy,
    fraction_rounded_away,
    parameter_dtype,
)
from drpo_lightning.modules.language_model import empty_language_model, load_language_model, prepare_for_training
from drpo_lightning.modules.policy_network import PolicyNetwork, head_is_linear
from drpo_lightning.modules.sharding import clip_gradient, fill, full_tensors, is_sharded, local, shard
from drpo_lightning.objectives import DRPO, Objective, ObjectiveOutput
from drpo_lightning.rollout.policy import RolloutPolicy
from drpo_lightning.rollout.weights import WeightSource

Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"]
PROVIDED_INPUTS = {"sequence_ids", "proximal_logprobs", "topk"}
"""Optional inputs of objectives that `training_step` provides."""


class StepOutput(TypedDict):
    """What `training_step` returns; callbacks get it in `on_train_batch_end`.

    Keys:
        loss: what is differentiated: the micro-batch's share in the update's loss, times the number of ranks and
            micro-batches that Lightning divides by.
        policy_logprobs: log pi `[batch, seq]`, detached.
        objective: the objective's per-token results, detached.
    """

    loss: Tensor
    policy_logprobs: Tensor
    objective: ObjectiveOutput


class PolicyModule(LightningModule, WeightSource, RolloutPolicy):
    """Trains a causal language model by a policy objective on `RolloutBatch`es.

    One `training_step` is one micro-batch; `trainer.accumulate_grad_batches` of them make an optimizer update. The
    loss is normalised over the whole update, all its micro-batches and ranks.

    Args:
        model: folder or name on the Hugging Face hub of any `AutoModelForCausalLM`.
        objective: what is maximised.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the schedule from the optimizer; it advances with every optimizer step.
        aggregation: how per-token losses become one number, see `drpo_lightning.functional.AGGREGATIONS`.
        horizon: tokens that `seq_mean_token_sum_norm` divides by; the paper takes 8192.
        temperature: temperature of the policy, that of the sampling. The command line takes it from there.
        gradient_checkpointing: computes activations again in the backward pass instead of keeping them.
        compile_layers: compiles the model's layers by `torch.compile`; the first steps take long. Needs a C++ compiler.
        logprob_chunk_size: tokens whose logits exist at a time.
        pass_threshold: reward from which on a validation sample counts as passed.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        ValueError: if the folder holds no model, or a setting is out of range.
    """

    def __init__(
        self,
        model: str,
        objective: Objective = DRPO(),  # noqa: B008 - frozen
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-6, weight_decay=0.01),
        lr_scheduler: LRSchedulerCallable | None = None,
        aggregation: Aggregation = "token_mean",
        horizon: int | None = None,
        temperature: float = 1.0,
        gradient_checkpointing: bool = False,
        compile_layers: bool = False,
        logprob_chunk_size: int = 1024,
        pass_threshold: float = 1.0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        model = os.path.expanduser(model)
        check_model_folder(model)
        if aggregation == "seq_mean_token_sum_norm" and (horizon is None or horizon < 1):
            raise ValueError(
                f"`model.horizon` must be positive for `seq_mean_token_sum_norm`, in tokens, got {horizon}; "
                "the paper takes 8192"
            )
        objective.check_inputs(PROVIDED_INPUTS)
        self.model_name = model
        self.objective = objective
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.aggregation = aggregation
        self.horizon = horizon
        self.temperature = temperature
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_layers = compile_layers
        self.logprob_chunk_size = logprob_chunk_size
        self.trust_remote_code = trust_remote_code
        self.validation_statistics = ValidationStatistics(pass_threshold)
        self.network: PolicyNetwork | None = None
        self._update_loss: float | Tensor = 0.0
        self._grad_norm = float("nan")
        self._logged_step = 0

    def setup(self, stage: str) -> None:
        """Checks that the policy is trained on the distribution that is sampled from."""
        check_strategy(self.trainer.strategy)
        check_precision(self.trainer.precision)
        if self.temperature == 0:
            raise SettingError(
                "`data.sampling.temperature` must be positive, got 0: greedy samples teach nothing. To validate with "
                "them, set `data.val_sampling`"
            )
        sampling = getattr(getattr(self.trainer, "datamodule", None), "sampling", None)
        if stage == "fit" and sampling is not None:
            check_sampling(sampling, self.objective, self.temperature)
        if stage == "fit":
            rank_zero_info(f"Objective: {self.objective.describe()}")

    def configure_model(self) -> None:
        """Loads the policy, in float32 whatever the checkpoint holds: small updates round away in bfloat16."""
        if self.network is not None:
            return
        strategy = self.trainer.strategy
        dtype = parameter_dtype(self.trainer.precision)
        if not is_sharded(strategy):
            self.network = self._make_network(self._load(load_language_model, dtype))
            return
        if isinstance(strategy, ModelParallelStrategy):
            check_mesh(self.device_mesh, self.trainer.world_size)
        source = self._load(load_language_model, "auto") if self.trainer.is_global_zero else None
        is_linear = strategy.broadcast(head_is_linear(source) if source is not None else None)
        empty = self._load(empty_language_model, dtype)
        self.network = shard(self._make_network(empty, is_head_linear=is_linear), strategy)
        fill(self.network, None if source is None else source.state_dict())

    def _load(self, load: Any, dtype: torch.dtype | str) -> Any:  # noqa: ANN401
        return load(self.model_name, dtype=dtype, trust_remote_code=self.trust_remote_code)

    def _make_network(self, language_model: Any, *, is_head_linear: bool | None = None) -> PolicyNetwork:  # noqa: ANN401
        prepare_for_training(
            language_model, gradient_checkpointing=self.gradient_checkpointing, compile=self.compile_layers
        )
        return PolicyNetwork(
            language_model,
            temperature=self.temperature,
            chunk_size=self.logprob_chunk_size,
            is_head_linear=is_head_linear,
        )

    def configure_optimizers(self) -> Any:  # noqa: ANN401
        """The optimizer, and its schedule by optimizer steps."""
        optimizer = self.make_optimizer(self.parameters())
        if self.make_lr_scheduler is None:
            return optimizer
        schedule = {"scheduler": self.make_lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_train_start(self) -> None:
        """Starts the count of updates, and warns of parameters too coarse in precision for the learning rate."""
        self._logged_step, self._update_loss = self.trainer.global_step, 0.0
        for group in self.trainer.optimizers[0].param_groups:
            lost = fraction_rounded_away(group["params"], group["lr"])
            if lost > 0.1:
                rank_zero_warn(
                    f"`model.optimizer` lr {group['lr']:g} is too small for parameters in bfloat16: an Adam update "
                    f"of that size leaves {lost:.0%} of them unchanged. Set `trainer.precision` to 32-true or "
                    "bf16-mixed, which keep the parameters in float32"
                )

    def forward(
        self,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Bool[Tensor, "batch seq"],
        completion_mask: Bool[Tensor, "batch seq"],
        topk_ids: Int[Tensor, "tokens k"] | None = None,
    ) -> Float[Tensor, "..."]:
        """Log pi of completion tokens, see `PolicyNetwork.forward`."""
        assert self.network is not None, "configure_model comes first"
        return self.network(input_ids, attention_mask, completion_mask, topk_ids)  # type: ignore[no-any-return]

    def training_step(self, batch: RolloutBatch, batch_idx: int) -> StepOutput:  # noqa: ARG002
        """Loss of one micro-batch."""
        policy_logprobs, topk = self._logprobs(batch)
        rows = torch.arange(len(batch.input_ids), device=self.device)[:, None].expand_as(batch.input_ids)
        output = self.objective(
            policy_logprobs,
            batch.rollout_logprobs,
            batch.advantages,
            batch.completion_mask,
            sequence_ids=rows,
            proximal_logprobs=batch.proximal_logprobs,
            topk=topk,
        )
        share = aggregate_loss(
            output.loss,
            batch.completion_mask,
            kind=self.aggregation,
            num_tokens=batch.num_update_tokens,
            num_sequences=batch.num_update_sequences,
            horizon=self.horizon,
        )
        self._update_loss += share.detach()
        # Ranks are averaged and Lightning divides by the micro-batches, of an incomplete last window too.
        scale = self.trainer.world_size * self.trainer.accumulate_grad_batches
        return StepOutput(
            loss=share * scale,
            policy_logprobs=policy_logprobs.detach(),
            objective=output._replace(loss=output.loss.detach()),
        )

    def _logprobs(self, batch: RolloutBatch) -> tuple[Float[Tensor, "batch seq"], TopKLogprobs | None]:
        """Log pi of the sampled tokens and, if the batch has them, of mu's most likely ones."""
        mask = batch.completion_mask
        if batch.topk_ids is None or batch.topk_logprobs is None:
            return self(batch.input_ids, batch.attention_mask, mask), None
        logprobs = self(batch.input_ids, batch.attention_mask, mask, batch.topk_ids[mask])
        sampled = torch.zeros_like(batch.rollout_logprobs).masked_scatter(mask, logprobs[:, 0])
        likely = torch.zeros_like(batch.topk_logprobs).masked_scatter(mask[..., None], logprobs[:, 1:])
        holds_sampled = (batch.topk_ids == batch.input_ids[..., None]).any(-1)
        return sampled, TopKLogprobs(likely, batch.topk_logprobs, holds_sampled)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips, and keeps the norm of the gradient before clipping."""
        assert self.network is not None, "configure_model comes first"
        is_by_norm = gradient_clip_val is not None and gradient_clip_algorithm in (None, "norm")
        self._grad_norm = clip_gradient(self.network, gradient_clip_val or math.inf if is_by_norm else math.inf)
        if not is_by_norm:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_batch_end(self, outputs: Any, batch: RolloutBatch, batch_idx: int) -> None:  # noqa: ANN401, ARG002
        """Logs the optimizer update that has just been completed, if one has."""
        if self.trainer.global_step == self._logged_step:
            return
        self._logged_step = self.trainer.global_step
        loss = self.trainer.strategy.reduce(torch.as_tensor(self._update_loss, device=self.device), reduce_op="sum")
        self._update_loss = 0.0
        metrics = {
            "optim/loss": float(loss),
            "optim/grad_norm": self._grad_norm,
            "optim/learning_rate": self.trainer.optimizers[0].param_groups[0]["lr"],
        }
        is_finite = all(map(math.isfinite, metrics.values()))  # if not, it is logged out of turn
        if self._logged_step % log_interval(self.trainer) == 0 or not is_finite:
            log_metrics(self.trainer, self, metrics)

    def validation_step(self, batch: ValidationBatch, batch_idx: int) -> None:  # noqa: ARG002
        """Counts the scored completions of validation prompts."""
        self.validation_statistics.update(batch.rollout)

    def on_validation_epoch_end(self) -> None:
        """Logs mean reward and pass@k, also of the validation before the first update."""
        metrics = {f"val/{name}": value for name, value in self.validation_statistics.compute().items()}
        log_metrics(self.trainer, self, metrics, is_epoch_end=True)
        self.validation_statistics.reset()

    @property
    def num_topk(self) -> int:
        """See `RolloutPolicy`."""
        return self.objective.num_topk

    @property
    def needs_proximal_logprobs(self) -> bool:
        """See `RolloutPolicy`."""
        return "proximal_logprobs" in self.objective.required_inputs

    @torch.no_grad()
    def score(self, rollout: Rollout, *, batch_size: int, pad_token_id: int) -> list[list[float]]:
        """See `RolloutPolicy`."""
        result: list[list[float]] = []
        for start in range(0, len(rollout), batch_size):
            rows = list(range(start, min(start + batch_size, len(rollout))))
            batch = RolloutBatch.collate(
                rollout, rows, rollout.rewards, pad_token_id=pad_token_id, num_update_tokens=0, num_update_sequences=0
            )
            inputs = (batch.input_ids, batch.attention_mask, batch.completion_mask)
            with self.trainer.precision_plugin.forward_context():
                logprobs = self(*(tensor.to(self.device) for tensor in inputs)).cpu()
            result += [row[mask].tolist() for row, mask in zip(logprobs, batch.completion_mask, strict=True)]
        return result

    def weight_shapes(self) -> dict[str, torch.Size]:
        """See `WeightSource`."""
        assert self.network is not None, "configure_model comes first"
        return dict(self.network.tensor_shapes)

    def weights_are_finite(self) -> bool:
        """See `WeightSource`."""
        finite = torch.stack([local(parameter).isfinite().all() for parameter in self.parameters()]).all()
        return bool(self.trainer.strategy.reduce(finite.float(), reduce_op="sum") == self.trainer.world_size)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `WeightSource`; sharded tensors are gathered one at a time, by layers under FSDP1."""
        assert self.network is not None, "configure_model comes first"
        return full_tensors(self.network)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes which model the weights belong to, for `drpo export`."""
        checkpoint["policy"] = {"model": self.model_name}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lets the data module put Lightning's progress to where its rollout goes on."""
        if (align_progress := getattr(self.trainer.datamodule, "align_progress", None)) is not None:  # type: ignore[attr-defined]
            align_progress(checkpoint)
