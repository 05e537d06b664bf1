"""The LightningModule: owns the policy, its objective and its optimizer."""

import math
import os
from typing import Any, Literal, TypedDict

import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from drpo_lightning.batch import RolloutBatch, ValidationBatch
from drpo_lightning.errors import SettingError
from drpo_lightning.functional.aggregation import aggregate_loss
from drpo_lightning.functional.divergences import TopKLogprobs
from drpo_lightning.logs import announce, log_interval, log_metrics
from drpo_lightning.metrics import ValidationStatistics
from drpo_lightning.modules.checks import (
    check_adapters,
    check_callbacks,
    check_mesh,
    check_model_folder,
    check_optimizer,
    check_precision,
    check_sampling,
    check_strategy,
    fraction_rounded_away,
    parameter_dtype,
)
from drpo_lightning.modules.engine_side import EngineSide
from drpo_lightning.modules.language_model import prepare_for_training
from drpo_lightning.modules.loading import Packing, load_network
from drpo_lightning.modules.logprob_backends import Backend, TokenLogprobs, choose_backend
from drpo_lightning.modules.lora import (
    LoRA,
    attach_adapter,
    check_adapter_settings,
    check_peft_available,
    drop_frozen_weights,
)
from drpo_lightning.modules.non_finite import NonFiniteWatch
from drpo_lightning.modules.policy_network import PolicyNetwork
from drpo_lightning.modules.reference import ReferenceModel, ReferencePenalty, load_frozen_network
from drpo_lightning.modules.sharding import clip_gradient
from drpo_lightning.objectives import DRPO, Objective, ObjectiveOutput

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


class PolicyModule(EngineSide):
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
        peft: trains low-rank adapters (LoRA) only, with these settings; by default all weights are trained.
        reference: penalty on the divergence from a frozen reference model; none by default, and no model is loaded.
        gradient_checkpointing: computes activations again in the backward pass instead of keeping them.
        compile_layers: compiles the model's layers by `torch.compile`; the first steps take long. Needs a C++ compiler.
        logprob_backend: what computes logprobs from the last hidden states: `chunked` (ours, any device), `compiled`
            (the same in fewer kernels, needs a C compiler), `linear_cross_entropy` (PyTorch's, for a CPU) or
            `cut_cross_entropy` (Apple's, for CUDA), see `drpo_lightning.modules.logprob_backends.TokenLogprobs`;
            `auto` takes the best for the device.
        logprob_chunk_mib: MiB of logits that exist at a time, whatever the vocabulary.
        packing: whether the samples of a micro-batch are computed as one sequence without padding: `auto` where the
            model computes the same, which is tried when it is loaded; `always` stops where it does not.
        pass_threshold: reward from which on a validation sample counts as passed.
        max_skipped_updates: updates in succession that are left out because a logprob, the loss or the gradient is NaN
            or infinite; the next one stops the run. The samples are written to `non_finite` in the log folder.
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
        peft: LoRA | None = None,
        reference: ReferencePenalty | None = None,
        gradient_checkpointing: bool = False,
        compile_layers: bool = False,
        logprob_backend: Backend = "auto",
        logprob_chunk_mib: int = 256,
        packing: Packing = "auto",
        pass_threshold: float = 1.0,
        max_skipped_updates: int = 0,
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
        if max_skipped_updates < 0:
            raise ValueError(f"`model.max_skipped_updates` must be 0 or positive, got {max_skipped_updates}")
        if logprob_chunk_mib < 1:
            raise ValueError(f"`model.logprob_chunk_mib` must be positive, got {logprob_chunk_mib}")
        objective.check_inputs(PROVIDED_INPUTS)
        if reference is not None and reference.model is not None:
            check_model_folder(os.path.expanduser(reference.model))
        self.model_name = model
        self.objective = objective
        self.make_optimizer = optimizer
        self.make_lr_scheduler = lr_scheduler
        self.aggregation = aggregation
        self.horizon = horizon
        self.temperature = temperature
        self.peft = peft
        self.reference = reference
        if peft is not None:
            check_peft_available()
            self.strict_loading = False  # a checkpoint has the adapters alone
            self.register_state_dict_post_hook(drop_frozen_weights)  # type: ignore[no-untyped-call]
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_layers = compile_layers
        self.logprob_backend: Backend = logprob_backend
        self.logprob_chunk_mib = logprob_chunk_mib
        self.packing = packing
        self.trust_remote_code = trust_remote_code
        self.validation_statistics = ValidationStatistics(pass_threshold)
        self.checkpoint_step = 0
        """Optimizer steps behind the checkpoint that was loaded."""
        self._subset_statistics: dict[str, ValidationStatistics] = {}
        self.network: PolicyNetwork | None = None
        self.reference_model: ReferenceModel | None = None
        self._update_loss: float | Tensor = 0.0
        self._update_penalty: float | Tensor = 0.0
        self._grad_norm = float("nan")
        self._logged_step = 0
        self._non_finite = NonFiniteWatch(max_skipped_updates)

    def setup(self, stage: str) -> None:
        """Checks that the policy is trained on the distribution that is sampled from."""
        check_strategy(self.trainer.strategy)
        check_precision(self.trainer.precision)
        if self.peft is not None:
            check_adapters(self.trainer.strategy, self.trainer.world_size)
        check_callbacks(self.trainer.callbacks)  # type: ignore[attr-defined]
        if self.temperature == 0:
            raise SettingError(
                "`data.sampling.temperature` must be positive, got 0: greedy samples teach nothing. To validate with "
                "them, set `data.val_sampling`"
            )
        choose_backend(self.logprob_backend, self.trainer.strategy.root_device)
        sampling = getattr(getattr(self.trainer, "datamodule", None), "sampling", None)
        if stage == "fit" and sampling is not None:
            check_sampling(sampling, self.objective, self.temperature)
        if stage == "fit":
            announce(self.trainer, f"Objective: {self.objective.describe()}")
            if self.reference is not None:
                announce(self.trainer, f"Reference: {self.reference.describe()}")

    def configure_model(self) -> None:
        """Loads the policy and, for a fit, the reference.

        The policy is in float32 whatever the checkpoint holds: small updates round away in bfloat16.
        """
        if self.network is None:
            self.network = self._load_policy()
        if self.reference is not None and self.reference_model is None and self.trainer.state.fn == "fit":
            self.reference_model = self._load_reference(self.reference)

    def _load_policy(self) -> PolicyNetwork:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            check_mesh(self.device_mesh, self.trainer.world_size)
        dtype = parameter_dtype(self.trainer.precision)

        def adapt(language_model: Any) -> None:  # noqa: ANN401
            if self.peft is not None:
                attach_adapter(language_model, self.peft, dtype=dtype)
            prepare_for_training(
                language_model, gradient_checkpointing=self.gradient_checkpointing, compile=self.compile_layers
            )

        return load_network(self.model_name, self.trainer.strategy, adapt=adapt, dtype=dtype, **self._network_settings)

    def _load_reference(self, settings: ReferencePenalty) -> ReferenceModel:
        assert self.network is not None, "the policy comes first"
        if settings.model is None and self.peft is not None:
            return ReferenceModel(self.network, is_adapted_policy=True)
        network = load_frozen_network(
            os.path.expanduser(settings.model or self.model_name),
            self.trainer.strategy,
            dtype=getattr(torch, settings.dtype),
            **self._network_settings,
        )
        return ReferenceModel(network)

    @property
    def token_logprobs(self) -> TokenLogprobs:
        """What computes logprobs from the last hidden states on the trainer's device."""
        device = self.trainer.strategy.root_device
        return choose_backend(self.logprob_backend, device, chunk_mib=self.logprob_chunk_mib)

    @property
    def _network_settings(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "token_logprobs": self.token_logprobs,
            "packing": self.packing,
            "trust_remote_code": self.trust_remote_code,
        }

    def configure_optimizers(self) -> Any:  # noqa: ANN401
        """The optimizer, and its schedule by optimizer steps."""
        optimizer = self.make_optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])
        check_optimizer(optimizer, self.trainer.precision)
        if self.make_lr_scheduler is None:
            return optimizer
        schedule = {"scheduler": self.make_lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_train_start(self) -> None:
        """Starts the count of updates, and warns of parameters too coarse in precision for the learning rate."""
        self._logged_step, self._update_loss, self._update_penalty = self.trainer.global_step, 0.0, 0.0
        self._non_finite.start()
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
        *,
        returns_entropy: bool = False,
    ) -> Float[Tensor, "..."]:
        """Log pi of completion tokens, or entropies at their places, see `PolicyNetwork.forward`."""
        assert self.network is not None, "configure_model comes first"
        return self.network(  # type: ignore[no-any-return]
            input_ids, attention_mask, completion_mask, topk_ids, returns_entropy=returns_entropy
        )

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
        share = self._share(output.loss, batch)
        penalties = None if self.reference is None else self.reference.token_penalties(policy_logprobs, batch)
        if penalties is not None:
            penalty = self._share(penalties, batch)
            self._update_penalty += penalty.detach()
            share = share + penalty
        self._update_loss += share.detach()
        self._non_finite.add(
            batch, policy_logprobs=policy_logprobs, objective_loss=output.loss, reference_penalty=penalties
        )
        # Ranks are averaged and Lightning divides by the micro-batches, of an incomplete last window too.
        scale = self.trainer.world_size * self.trainer.accumulate_grad_batches
        return StepOutput(
            loss=share * scale,
            policy_logprobs=policy_logprobs.detach(),
            objective=output._replace(loss=output.loss.detach()),
        )

    def _share(self, loss: Float[Tensor, "batch seq"], batch: RolloutBatch) -> Float[Tensor, ""]:
        """What the tokens of a micro-batch add to the loss of its update."""
        return aggregate_loss(
            loss,
            batch.completion_mask,
            kind=self.aggregation,
            num_tokens=batch.num_update_tokens,
            num_sequences=batch.num_update_sequences,
            horizon=self.horizon,
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
        """Clips, and keeps the norm before; drops a gradient that must not be applied, and optimizers do nothing."""
        assert self.network is not None, "configure_model comes first"
        is_by_norm = gradient_clip_val is not None and gradient_clip_algorithm in (None, "norm")
        self._grad_norm = clip_gradient(self.network, gradient_clip_val or math.inf if is_by_norm else math.inf)
        if self._non_finite.must_skip(self.trainer, self, loss=self._update_loss, grad_norm=self._grad_norm):
            optimizer.zero_grad()
        elif not is_by_norm:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_train_batch_end(self, outputs: Any, batch: RolloutBatch, batch_idx: int) -> None:  # noqa: ANN401, ARG002
        """Logs the optimizer update that has just been completed, if one has, and frees its gradients."""
        if self.trainer.global_step == self._logged_step:
            return
        self._logged_step = self.trainer.global_step
        for optimizer in self.trainer.optimizers:
            optimizer.zero_grad()  # the memory is the engine's until the next backward pass
        sums = torch.tensor([float(self._update_loss), float(self._update_penalty)], device=self.device)
        loss, penalty = self.trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        self._update_loss, self._update_penalty = 0.0, 0.0
        metrics = {
            "optim/loss": loss,
            "optim/grad_norm": self._grad_norm,
            "optim/learning_rate": self.trainer.optimizers[0].param_groups[0]["lr"],
            "optim/skipped_updates": self._non_finite.num_skipped,
        }
        if self.reference is not None and self.reference.placement == "loss":
            metrics["optim/reference_penalty"] = penalty
        is_finite = all(map(math.isfinite, metrics.values()))  # if not, it is logged out of turn
        if self._logged_step % log_interval(self.trainer) == 0 or not is_finite:
            log_metrics(self.trainer, self, metrics)

    def validation_step(self, batch: ValidationBatch, batch_idx: int) -> None:  # noqa: ARG002
        """Counts the scored completions of validation prompts, all of them and by subset."""
        self.validation_statistics.update(batch.rollout)
        for name, prompts in batch.subsets.items():
            if name not in self._subset_statistics:
                metric = ValidationStatistics(self.validation_statistics.pass_threshold).to(self.device)
                self._subset_statistics[name] = metric
            self._subset_statistics[name].update(batch.rollout, prompts)

    def on_validation_epoch_end(self) -> None:
        """Logs mean reward, pass@k and so on, also of the validation before the first update."""
        of_all = {"val": self.validation_statistics}
        of_subsets = {f"val/{name}": metric for name, metric in self._subset_statistics.items()}
        metrics: dict[str, float] = {}
        for prefix, metric in (of_all | of_subsets).items():
            metrics |= {f"{prefix}/{name}": value for name, value in metric.compute().items()}
            metric.reset()
        log_metrics(self.trainer, self, metrics)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes which model the weights belong to, for `drpo export`."""
        adapters = None if self.peft is None else self.peft.trained_settings
        model = os.path.abspath(self.model_name) if os.path.isdir(self.model_name) else self.model_name
        checkpoint["policy"] = {"model": model, "peft": adapters}
        checkpoint["non_finite"] = self._non_finite.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks the adapters; lets the data module put Lightning's progress to where its rollout goes on."""
        check_adapter_settings(self.peft, checkpoint.get("policy", {}).get("peft"))
        self.checkpoint_step = int(checkpoint.get("global_step", 0))
        if "non_finite" in checkpoint:
            self._non_finite.load_state_dict(checkpoint["non_finite"])
        if (align_progress := getattr(self.trainer.datamodule, "align_progress", None)) is not None:  # type: ignore[attr-defined]
            align_progress(checkpoint)
