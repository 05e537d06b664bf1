"""TRL's side of `step.py`, which runs it in an environment with TRL 1.16: python step_trl.py WORKLOAD.json.

Overrides internal methods of `GRPOTrainer` to time and to count; none of them does anything else than TRL's.
"""

import sys
import tempfile
from contextlib import nullcontext
from typing import Any

import torch
from datasets import Dataset
from step_clock import StepClock, Workload, scattered_reward
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found]

NO_TOKEN = -1


class SteppedTrainer(GRPOTrainer):  # type: ignore[misc]
    """Stops before each rollout until it is asked for."""

    clock: StepClock

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:  # noqa: ANN401
        self.clock.next_step(self.state.global_step)
        with self.clock.phase("rollout"):
            rollout: dict[str, Any] = super()._generate_and_score_completions(inputs)
        self.clock.count("sampled_tokens", rollout["completion_mask"].sum())
        self.clock.count("prompt_tokens", rollout["prompt_mask"].sum())
        return rollout

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        with nullcontext() if torch.is_grad_enabled() else self.clock.phase("logprobs"):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        self.clock.count("trained_tokens", inputs["completion_mask"].sum())
        return super()._compute_loss(model, inputs)  # type: ignore[no-any-return]


class LastStep(TrainerCallback):  # type: ignore[misc]
    """Ends the last step.

    Args:
        clock: that of the trainer.
    """

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401, ARG002
        """The last update is done."""
        self.clock.end_step(state.global_step)


def make_settings(workload: Workload, folder: str) -> Any:  # noqa: ANN401
    """GRPO with the token mean of DAPO, which is our aggregation, and without a reference model."""
    is_vllm = workload.engine == "vllm"
    return GRPOConfig(
        output_dir=folder,
        use_cpu=workload.device == "cpu",
        bf16=workload.precision == "bf16-mixed",
        per_device_train_batch_size=workload.micro_batch_size,
        gradient_accumulation_steps=workload.num_micro_batches,
        steps_per_generation=workload.num_updates * workload.num_micro_batches,
        num_generations=workload.group_size,
        max_completion_length=workload.max_tokens,
        temperature=workload.temperature,
        generation_kwargs={"ignore_eos": True} if is_vllm else {"eos_token_id": NO_TOKEN},
        use_vllm=is_vllm,
        vllm_mode="colocate",
        vllm_enable_sleep_mode=is_vllm and workload.device == "cuda",
        vllm_gpu_memory_utilization=workload.gpu_memory_utilization,
        vllm_max_model_length=workload.max_model_len,
        vllm_importance_sampling_correction=workload.recompute_logprobs,
        loss_type="dapo",
        epsilon=0.2,
        beta=0.0,
        optim="adamw_torch_fused",
        learning_rate=workload.learning_rate,
        weight_decay=0.01,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        gradient_checkpointing=workload.gradient_checkpointing,
        max_steps=workload.num_steps * workload.num_updates,
        shuffle_dataset=False,
        dataloader_pin_memory=workload.device == "cuda",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main() -> None:
    """Runs as many steps as the workload says, one each time that it is asked."""
    workload = Workload.from_file(sys.argv[1])
    clock = StepClock(workload.device)
    torch.set_num_threads(workload.threads)
    rows = [{"prompt": prompt} for prompt in workload.prompts] * workload.num_steps
    with tempfile.TemporaryDirectory() as folder:
        trainer = SteppedTrainer(
            workload.model,
            scattered_reward,
            args=make_settings(workload, folder),
            train_dataset=Dataset.from_list(rows),
            callbacks=[LastStep(clock)],
        )
        trainer.clock = clock
        trainer.eos_token_ids = [NO_TOKEN]
        if workload.engine == "vllm":
            sync_weights = trainer.vllm_generation.sync_weights

            def timed_sync() -> None:
                with clock.phase("sync"):
                    sync_weights()

            trainer.vllm_generation.sync_weights = timed_sync
        trainer.train()


if __name__ == "__main__":
    main()
